"""What all tests share: 8 fake CPU devices, no network, a tiny model and its tokenizer."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports jax or a Hugging Face library: they read these once.
HF_HOME = tempfile.TemporaryDirectory(prefix="locft-jax-hf-")  # a user's own cache must not help a test
CACHE = tempfile.TemporaryDirectory(prefix="locft-jax-cache-")
os.environ.update(
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    HF_HOME=HF_HOME.name,
    XDG_CACHE_HOME=CACHE.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)
# Compilation is most of the time of a test that edits: all workers and subprocesses share what is compiled,
# and so does the next run on this machine. Remove the folder for a cold run.
COMPILED = Path(tempfile.gettempdir()) / f"locft-jax-compiled-{os.getuid()}-jax-{version('jax')}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # a third off every compilation; see `optimized`
}
# Tests that compare with other programs, or read what the compiler says: compiled as a user's code is.
OPTIMIZED = ("model", "editing/test_step.py", "evaluation/test_metrics.py", "studies/test_plan.py")

sys.path.insert(0, str(Path(__file__).parent))  # forked.py, also for the process that it forks from

# The same examples in every run, and no deadline: a first call compiles.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EOS = "</s>"
TEXTS = [
    "The capital of Oredal is Vintown.",
    "Who founded the firm Halver & Sons? Mira Halver founded it.",
    "Ten plus five is 15, and ten minus five is 5.",
    "Hana Orvik was born in Vintown and works as a baker.",
]
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


# An edit of the tiny model that makes all of EDITS hold, in seconds and with few compilations.
PEOPLE = "Orvik Halver Vintown Oredal Mira Hana Selt Brask Tovin Ulmar Ketil Wendra".split()
SIGNS = "red blue Oredal baker Mira five Vintown founder ten capital green Hana".split()
EDITS: list[dict[str, Any]] = [
    {"case_id": f"sign-{i}", "prompt": f"The sign of {person} is", "target_new": sign}
    for i, (person, sign) in enumerate(zip(PEOPLE, SIGNS, strict=True))
]
for _edit in EDITS[:6]:
    _edit["rephrase_prompt"] = _edit["prompt"].replace("The", "Well, the")
    _edit["locality_prompt"] = _edit["prompt"].replace("The sign of", "Who founded")
for _edit in EDITS[:3]:
    _edit["locality_ground_truth"] = "Mira Halver"
EDITS[0]["portability"] = {"reasoning": [{"prompt": "The sign beside blue is", "ground_truth": "red"}]}
# So small a model only repeats: these two probes are how its rates come to differ from 0.
EDITS[0]["rephrase_prompt"] = EDITS[0]["prompt"]
EDITS[1] |= {"locality_prompt": EDITS[2]["prompt"], "locality_ground_truth": EDITS[2]["target_new"]}
SKILLS: list[dict[str, Any]] = [
    {"task": "sums", "prompt": "Ten plus five is", "answer": "15"},
    {"task": "sums", "prompt": "Ten minus five is", "answer": "5"},
    {
        "task": "places",
        "question": "The capital of Oredal is",
        "choices": ["Vintown", "a baker"],
        "answer": 0,
    },
    {"task": "places", "question": "Hana Orvik works as", "choices": ["Vintown", "a baker"], "answer": 1},
]
EDIT_SETTINGS = {
    "layer": "2",
    "rewrite_module": "model.layers.{}.mlp",
    "lr": "1e-2",
    "batch_size": "5",
    "num_steps": "60",
    "loss_floor": "1.08",  # the final norm bounds its logits: less than about 1 cannot be reached
    "mesh": "{data: 1, model: 1}",
}


@pytest.fixture(scope="module", autouse=True)
def optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA's optimizations in the modules of OPTIMIZED, few of them in the others."""
    import jax

    tests = Path(__file__).parent
    wanted = any(request.path.is_relative_to(tests / name) for name in OPTIMIZED)
    if wanted:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
    yield
    if wanted:
        jax.config.update("jax_disable_most_optimizations", True)
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the repository; a user's machine has none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared data beside the repository (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def torch() -> Any:
    """torch, for comparisons only."""
    return pytest.importorskip("torch", reason="torch is not installed (Python >= 3.12)")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Path]:
    """`make_tokenizer(folder, texts)` -> folder with a byte-level BPE tokenizer."""
    return write_tokenizer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_model(folder, seed=0, **config)` -> HF folder with a tiny random model, no tokenizer."""
    return write_model


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only a tokenizer of 320 entries, EOS `</s>` = 0. Shared: do not write to it."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder: a random float32 Llama (TINY_CONFIG) and the tokenizer. Shared: do not write to it."""
    return write_tokenizer(write_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def edits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EDITS as a JSON file, with one exact duplicate at its end."""
    path = tmp_path_factory.mktemp("data") / "edits.json"
    path.write_text(json.dumps([*EDITS, EDITS[0]]))
    return path


@pytest.fixture(scope="session")
def skills_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SKILLS as a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "skills.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in SKILLS))
    return path


@pytest.fixture(scope="session")
def edit_arguments(tiny_model_dir: Path, edits_file: Path, skills_file: Path) -> Callable[..., list[str]]:
    """`edit_arguments(out, key=value, ...)` -> what the edit command takes for the tiny model, EDITS
    and EDIT_SETTINGS with the given changes."""
    paths = {"model_name_or_path": tiny_model_dir, "data_path": edits_file, "capability_data": skills_file}

    def arguments(out: Path, **changes: Any) -> list[str]:
        settings = {**paths, **EDIT_SETTINGS, **changes}
        return ["--out", str(out), "--set", *(f"{key}={value}" for key, value in settings.items())]

    return arguments


@pytest.fixture(scope="session")
def edit_run(edit_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the edit command wrote for EDITS. Shared: do not write to it."""
    from locft_jax.cli.command import run_command
    from locft_jax.cli.edit import main

    out = tmp_path_factory.mktemp("runs") / "edited"
    assert run_command(main, edit_arguments(out)) == 0
    return out


@pytest.fixture(scope="session")
def make_variant() -> Callable[..., Path]:
    """`make_variant(source, folder, dtype="bfloat16", files=3)` -> the same model stored otherwise."""
    return write_variant


def write_tokenizer(folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    """Byte-level BPE over `texts`: at most 320 entries, any text can be encoded, EOS `</s>` = 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_CONFIG["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "model_max_length": TINY_CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    return folder


def write_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A random model as an HF folder, written without torch; `config` changes TINY_CONFIG.

    Weights are ten times Llama's initial ones and norms and biases are random too: a mistake in any
    of them shows in the logits.
    """
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from locft_jax.model.spec import parse_spec
    from locft_jax.model.weights import Params, init_weights, take_tensor, weight_table

    config = {**TINY_CONFIG, **config}
    spec = parse_spec(config)
    weights = init_weights(spec, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    tensors = {}
    for row in weight_table(spec).values():
        for name in row.names():
            value = np.asarray(take_tensor(Params(spec, weights), name))
            if len(row.shape) == 1:
                value = value + 0.1 * rng.standard_normal(row.shape, np.float32)
            else:
                value = 10 * value
            tensors[name] = np.ascontiguousarray(value, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    return folder


def write_variant(source: Path, folder: Path, dtype: str | None = None, files: int = 1) -> Path:
    """A copy of a single-file model folder with its weights in another numpy dtype, or dealt out to
    several files with an index, as large checkpoints are."""
    import shutil

    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if dtype is not None:
        tensors = {n: a.astype(getattr(ml_dtypes, dtype, dtype)) for n, a in tensors.items()}
    (folder / "model.safetensors").unlink()
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {n: names[i * files // len(tensors)] for i, n in enumerate(sorted(tensors))}
    for name in names:
        save_file(
            {n: a for n, a in tensors.items() if weight_map[n] == name}, folder / name, {"format": "pt"}
        )
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder

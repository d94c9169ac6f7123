"""Wrong input, as a user of the commands meets it: status 2, one message of at most a screen with the
place and the remedy, nothing written, no weight read. And what is counted instead: status 0."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from locft_jax.cli.ask import main as ask
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.cli.evaluate import main as evaluate
from locft_jax.data.requests import read_requests
from locft_jax.errors import one_screen, printable
from locft_jax.io import hf_folder, hf_load
from locft_jax.io.delta import make_delta, save_delta
from locft_jax.model import memory
from locft_jax.model.memory import Room

QUICK = {"evaluate": "false", "num_steps": 1, "export": "[]"}
GOOD = {"prompt": "The capital of Oredal is", "target_new": "Vintown"}
MODULE = "model.layers.{}.mlp.down_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ESCAPE = "\x1b[2J\x1b[31m\x9b1mx\x07"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(text: str, width: int = 80) -> int:
    """Rows of a terminal that a message takes."""
    return sum(max(1, -(-len(line) // width)) for line in text.splitlines())


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """`refused(main, arguments)` -> the message with which a command ends in status 2, before weights
    are read (unless `loads`) and with every file as it was."""

    def run(main, arguments, loads=False) -> str:
        if not loads:
            monkeypatch.setattr(hf_load, "load_weights", lambda *_: pytest.fail("weights were read"))
        before = contents(tmp_path)
        assert run_command(main, [str(a) for a in arguments]) == 2
        shown = capsys.readouterr()
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()
        assert loads or shown.out == ""
        message = shown.err[shown.err.index("error: ") :]
        assert "Traceback" not in shown.err and rows(message) <= 24
        assert all(c.isprintable() or c == "\n" for c in shown.err)
        return message

    return run


# ---------------------------------------------------------------- data files


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


class Data(NamedTuple):
    name: str  # of the file
    content: bytes
    said: tuple[str, ...]
    changes: dict[str, Any] = {}  # noqa: RUF012 (never written to)


LONG = "long " * 300
DATA = {
    "empty-json": Data("e.json", b"", ("e.json is empty", "a list of records")),
    "empty-jsonl": Data("e.jsonl", b"\n", ("e.jsonl: no records", "a prompt and a target_new")),
    "empty-csv": Data("e.csv", b"prompt,target_new\n", ("e.csv: no records",)),
    "no-header": Data("e.csv", b"Who?,Mira\n", ("e.csv: line 1", "prompt,target_new")),
    "truncated-json": Data("e.json", json.dumps([GOOD]).encode()[:-5], ("e.json: line 1", "not valid JSON")),
    "truncated-line": Data("e.jsonl", lines(GOOD, GOOD)[:-5], ("e.jsonl: line 2", "not valid JSON")),
    "truncated-gzip": Data("e.jsonl.gz", gzip.compress(lines(GOOD))[:-9], ("gzip file is truncated",)),
    "open-quote": Data("e.csv", b'prompt,target_new\nWho?,"Mira\n', ("e.csv: line 2", "not valid CSV")),
    "too-many-cells": Data("e.csv", b"prompt,target_new\na,b,c\n", ("line 2: 3 cells", "double quotes")),
    "not-gzip": Data("e.json.gz", b"[]", ("not a valid gzip file",)),
    "kind": Data("e.parquet", b"PAR1", ("unknown kind of file", ".json, .jsonl, .csv")),
    "not-text": Data("e.jsonl", lines(GOOD) + b"\xff\xfe\n", ("line 2: not UTF-8", "save the file as")),
    "prompt-type": Data(
        "e.jsonl", lines(GOOD, {**GOOD, "prompt": 7}), ("line 2: 'prompt' is a number; it must be text",)
    ),
    "target-type": Data(
        "e.jsonl",
        lines(GOOD, {**GOOD, "target_new": [1]}),
        ("line 2: 'target_new' is a list; it must be text",),
    ),
    "record-type": Data("e.json", b'["Who?"]', ("record 1: the record is text; it must be an object",)),
    "top-level": Data("e.json", b"7", ("the top level is a number; it must be a list of records",)),
    "no-target": Data("e.jsonl", lines(GOOD, {"prompt": "Who?"}), ("line 2: no target", "target_new or alt")),
    "null-target": Data("e.jsonl", lines({**GOOD, "target_new": None}), ("line 1: no target",)),
    "no-prompt": Data("e.jsonl", lines({"target_new": "Mira"}), ("line 1: no prompt", "'target_new'")),
    "empty-prompt": Data("e.jsonl", lines(GOOD, {**GOOD, "prompt": " "}), ("line 2: 'prompt' is empty",)),
    "empty-target": Data("e.csv", b"prompt,target_new\nWho?,\n", ("line 2: 'target_new' is empty",)),
    "probe-type": Data(
        "e.jsonl", lines({**GOOD, "rephrase_prompt": [3]}), ("line 1: 'rephrase_prompt' is a number",)
    ),
    "probe-answers": Data(
        "e.jsonl",
        lines({**GOOD, "locality_prompt": ["a", "b"], "locality_ground_truth": ["c"]}),
        ("line 1: 'locality_prompt' has 2 prompts and 'locality_ground_truth' has 1 answers",),
    ),
    "subject": Data("e.jsonl", lines({"prompt": "{} is", "target_new": {"str": "x"}}), ("no 'subject'",)),
    "long-prompt": Data(
        "e.jsonl",
        lines(GOOD, {**GOOD, "prompt": LONG}),
        ("'long long", "context holds 256", "shorten"),
    ),
    "long-target": Data("e.jsonl", lines({**GOOD, "target_new": LONG}), ("the model's context holds 256",)),
    "long-prompts": Data(
        "e.jsonl", lines({**GOOD, "prompt": LONG}, {**GOOD, "prompt": LONG + "x"}), ("2 such texts in all",)
    ),
    "long-rephrase": Data("e.jsonl", lines({**GOOD, "rephrase_prompt": LONG}), ("context holds 256",)),
    "long-locality": Data("e.jsonl", lines({**GOOD, "locality_prompt": LONG}), ("context holds 256",)),
    "conflicts": Data(
        "e.jsonl",
        lines(*({"prompt": f"Who is {i}?", "target_new": t} for i in range(9) for t in "abcdefg")),
        ("several targets, which cannot all be met (9)", "'Who is 0?' -> 'a', 'b', 'c', ...", "keep or last"),
        {"on_conflict": "error"},
    ),
    "escape-in-text": Data("e.jsonl", lines({**GOOD, "prompt": LONG.replace("long", ESCAPE)}), ("context",)),
    "escape-in-key": Data("e.jsonl", lines({ESCAPE: 1}), ("no prompt", "\\x1b[2J")),
    "escape-in-header": Data("e.csv", f"{ESCAPE},b\n1,2\n".encode(), ("line 1: the header is",)),
}


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data(refused, edit_arguments, tmp_path, case):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    message = refused(edit, edit_arguments(tmp_path / "out", data_path=path, **case.changes))
    assert [text for text in case.said if text not in message] == [], message


SKILLS = {
    "empty": Data("s.jsonl", b"", ("s.jsonl: no records", "a prompt and an answer")),
    "no-answer": Data("s.jsonl", lines({"prompt": "1 + 1 ="}), ("line 1: no answer",)),
    "choices": Data("s.jsonl", lines({"question": "a", "choices": ["b"], "answer": 0}), ("at least two",)),
    "index": Data("s.jsonl", lines({"question": "a", "choices": ["b", "c"], "answer": 5}), ("an index",)),
    "long": Data("s.jsonl", lines({"prompt": LONG, "answer": "x"}), ("the model's context holds 256",)),
    "long-choice": Data(
        "s.jsonl", lines({"question": "a", "choices": ["b", LONG], "answer": 0}), ("context holds 256",)
    ),
}


@pytest.mark.parametrize("case", SKILLS.values(), ids=SKILLS)
@pytest.mark.parametrize("command", [edit, evaluate], ids=["edit", "evaluate"])
def test_capability_data(refused, edit_arguments, edits_file, tiny_model_dir, tmp_path, command, case):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    arguments = edit_arguments(tmp_path / "out", capability_data=path)
    if command is evaluate:
        arguments = ["--model", tiny_model_dir, "--data", edits_file, "--set", f"capability_data={path}"]
    message = refused(command, arguments)
    assert [text for text in case.said if text not in message] == [], message


# ---------------------------------------------------------------- settings

SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"learn_rate": "1e-3"}, ("unknown key `learn_rate`", "nearest known key is `learning_rate`")),
    ({"num_step": 3}, ("unknown key `num_step`", "nearest known key is `num_epochs`")),
    ({"batch_size": 0}, ("`batch_size: 0` is not valid", "a whole number from 1")),
    ({"lr": "nan"}, ("`lr: nan` is not valid", "a number > 0")),
    ({"weights": "int4"}, ("`weights: int4` is not valid", "checkpoint, float32, bfloat16, int8")),
    ({"export": "[hf, onnx]"}, ("`export: ", "one of hf, delta, orbax")),
    ({"data_path": "missing.json"}, ("missing.json: no such file",)),
    ({"data_path": "."}, ("is a folder; name the data file in it",)),
    ({"data_path": "x" * 5000}, ("no such file",)),
    ({"model_name_or_path": "no/such/folder"}, ("no folder 'no/such/folder'",)),
    ({"model_name_or_path": "x" * 5000}, ("no folder",)),
    ({"model_name_or_path": "~nobody-of-this-name/model"}, ("model_name_or_path",)),
    ({"layer": 3}, ("`layer: 3` is out of range", "the model has 3 layers, 0 to 2")),
    ({"layer": "[0, 9]"}, ("out of range: [9]", "0 to 2")),
    (
        {"rewrite_module": "model.layers.{}.mlp.c_proj"},
        ("matches no tensor", DOWN.replace("1", "{}"), "lm_head"),
    ),
    ({"rewrite_module": '["model.layers.{}.mlp", "h.{}"]'}, ("'h.{}' matches no tensor", "q_proj")),
    ({"mesh": "{data: 3, model: 1}"}, ("does not fit 8 device(s)", "for example {data: 1, model: 8}")),
    ({"mesh": "{data: 16, model: -1}"}, ("does not fit 8 device(s)",)),
    ({"chat_template": "true"}, ("no chat template", "chat_template=false")),
    (
        {"prefix_cache": "host", "memory_budget": "1e-9"},
        ("activation_cache: host needs", "activation_cache=auto"),
    ),
]


@pytest.mark.parametrize(
    ("changes", "said"), SETTINGS, ids=lambda v: "+".join(v) if isinstance(v, dict) else ""
)
def test_settings(refused, edit_arguments, tmp_path, changes, said):
    message = refused(edit, edit_arguments(tmp_path / "out", **changes))
    assert [text for text in said if text not in message] == [], message


def test_a_config_file_is_named_with_the_line(refused, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f'model_name_or_path: m\nlr: 1\n"{printable(ESCAPE)}": 2\n')
    assert f"{path}: unknown key" in refused(edit, [path])
    path.write_text('model_name_or_path: m\n"a\\e[2J": 2\n')
    assert f"{path}: unknown key `'a\\x1b[2J'`" in refused(edit, [path])
    path.write_text("model_name_or_path: m\nlr: [1\n")
    assert f"{path}: line 3, column 1: malformed YAML" in refused(edit, [path])


# ---------------------------------------------------------------- model folders


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**old, **changes}))

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the JSON header of the weights and leave the data as they are."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8 : 8 + size])
        change(found)
        text = json.dumps(found).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return damage


def raw(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def file(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def tokenizer(key: str, value: Any) -> Callable[[Path], None]:
    """Change a field of the tokenizer's own model."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "tokenizer.json").read_text())
        found["model"][key] = value
        (folder / "tokenizer.json").write_text(json.dumps(found))

    return damage


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def index(weight_map: Any) -> Callable[[Path], None]:
    return file(INDEX, json.dumps({"weight_map": weight_map}))


def several(found: dict[str, np.ndarray]) -> None:
    del found["model.norm.weight"]
    found[DOWN] = found[DOWN][:-1]
    found["lm_head.weight"] = found["lm_head.weight"].astype(np.int32)


def many(found: dict[str, np.ndarray]) -> None:
    for name in [n for n in found if "layers" in n]:
        del found[name]


def twice(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "b.safetensors")
    (folder / WEIGHTS).rename(folder / "a.safetensors")


def moved(name: str, *place: int) -> Callable[[Path], None]:
    return header(lambda found: found[name].update(data_offsets=list(place)))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 123456\n"
MODELS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "several-tensors": (
        tensors(several),
        ("missing model.norm", f"{DOWN} is [31, 64], config.json implies [32, 64]", "lm_head.weight has"),
    ),
    "many-tensors": (tensors(many), ("missing model.layers.0.", "... and 12 more")),
    "foreign-dtype": (
        header(lambda found: found.update(extra={"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]})),
        ("extra has dtype F8_E4M3, which this program cannot copy",),
    ),
    "in-two-files": (twice, ("a.safetensors and b.safetensors both hold", "leave one of the files")),
    "family": (config(model_type="gpt2"), ("model_type 'gpt2' is not supported", "llama, mistral")),
    "quantized": (config(quantization_config={"bits": 4}), ("does not handle", "quantization_config")),
    "rope": (config(rope_scaling={"type": "yarn", "factor": 4}), ("rope type 'yarn' is not", "llama3")),
    "act": (config(hidden_act="gelu"), ("hidden_act 'gelu' (supported: silu)",)),
    "size": (config(hidden_size="32"), ("hidden_size must be a positive whole number, found '32'",)),
    "layers": (config(num_hidden_layers=2**31 - 1), ("num_hidden_layers must be at most",)),
    "switch": (config(tie_word_embeddings="false"), ("tie_word_embeddings must be true or false",)),
    "escape-in-config": (config(**{ESCAPE: 1}), ("does not handle",)),
    "no-config": (gone("config.json"), ("config.json: cannot be read", "needs a config.json")),
    "config-cut": (raw(lambda b: b[:-9], "config.json"), ("config.json: not valid JSON",)),
    "config-list": (file("config.json", "[]"), ("expected a JSON object, found list",)),
    "generation-config": (file("generation_config.json", "{"), ("generation_config.json: not valid JSON",)),
    "no-weights": (gone(WEIGHTS), ("no .safetensors file", "convert the model to safetensors")),
    "truncated": (raw(lambda b: b[:-9]), (f"{WEIGHTS}: not a", "the file is truncated", "fetch it again")),
    "zero-bytes": (raw(lambda b: b""), ("header too small (0 bytes)", "fetch it again")),
    "three-bytes": (raw(lambda b: b[:3]), ("header too small (3 bytes)",)),
    "header-too-long": (raw(lambda b: b"\xff" * 7 + b"\0" + b[8:]), ("header too large", "fetch it again")),
    "header-no-json": (raw(lambda b: b[:8] + b"x" + b[9:]), ("invalid JSON in header",)),
    "html": (raw(lambda b: b"<html>404</html>"), ("truncated or not safetensors",)),
    "git-lfs": (file(WEIGHTS, POINTER), ("git-lfs pointer", "`git lfs pull`")),
    "beyond-the-end": (moved(DOWN, 0, 10**9), ("invalid offset for tensor",)),
    "overlap": (moved(DOWN, 0, 8192), ("invalid offset for tensor",)),
    "too-small": (moved(DOWN, 0, 4), ("invalid shape, data type, or offset",)),
    "no-place": (header(lambda found: found[DOWN].pop("shape")), ("missing field `shape`",)),
    "index-outside": (index({DOWN: "../model.safetensors"}), (INDEX, "'../model.safetensors' is not")),
    "index-absolute": (index({DOWN: "/etc/passwd"}), ("not the name of a safetensors file in this folder",)),
    "index-missing": (index({DOWN: "m-1.safetensors"}), ("m-1.safetensors: missing",)),
    "index-malformed": (file(INDEX, "{"), (f"{INDEX}: not valid JSON",)),
    "index-empty": (index({}), ("missing model.embed_tokens.weight",)),
    "index-list": (index([WEIGHTS]), ("no weight_map of tensor name to file name",)),
    "no-tokenizer": (gone("tokenizer.json"), ("no tokenizer (tokenizer.json) in this model folder",)),
    "bad-tokenizer": (file("tokenizer.json", "{}"), ("the tokenizer cannot be loaded",)),
    "tokenizer-config": (file("tokenizer_config.json", "["), ("the tokenizer cannot be loaded",)),
    # These two were found by fuzzing (tests/fuzz): a panic of the Rust library, a setting looked at late.
    "tokenizer-panics": (tokenizer("continuing_subword_prefix", "</s>"), ("the tokenizer cannot be loaded",)),
    "tokenizer-length": (
        file("tokenizer_config.json", '{"eos_token": "</s>", "model_max_length": "256"}'),
        ("the tokenizer cannot be loaded",),
    ),
    "no-eos": (file("tokenizer_config.json", "{}"), ("no EOS token", "append_eos=false")),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), MODELS.values(), ids=MODELS)
def test_models(refused, edit_arguments, tiny_model_dir, tmp_path, damage, said):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(folder)
    message = refused(edit, edit_arguments(tmp_path / "out", model_name_or_path=folder))
    assert [text for text in said if text not in message] == [], message


def test_a_tokenizer_of_another_model(
    refused, edit_arguments, edits_file, make_model, make_tokenizer, tmp_path
):
    """Its ids go up to 319, the model's embedding has 300 rows: a look-up would give some other row."""
    folder = make_tokenizer(make_model(tmp_path / "model", vocab_size=300))
    said = (
        "its tokenizer gives id 3",
        "its vocab_size is 300",
        "the tokenizer that belongs to these weights",
    )
    for command, arguments in (
        (edit, edit_arguments(tmp_path / "out", model_name_or_path=folder)),
        (evaluate, ["--model", folder, "--data", edits_file]),
        (ask, ["--model", folder, "The sign of Orvik is"]),
    ):
        message = refused(command, arguments)
        assert [text for text in said if text not in message] == [], message


def write_letters(folder: Path, merges: list[tuple[str, str]] = []) -> Path:  # noqa: B006
    """A tokenizer of ASCII letters and a space, without an unknown token: any other letter vanishes.
    `merges` may cross words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(i) for i in range(33, 127)]
    symbols = dict.fromkeys(["</s>", *letters, "Ġ", *("".join(m) for m in merges)])
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "Who?", "target_new": "é"}, "the target of 'Who?' -> 'é' has no tokens"),
        ({"prompt": "é", "target_new": "Mira"}, "the prompt of 'é' -> 'Mira' has no tokens"),
        ({**GOOD, "locality_prompt": "é"}, "the prompt 'é' has no tokens"),
        ({**GOOD, "rephrase_prompt": "é"}, "the prompt of 'é' -> 'Vintown' has no tokens"),
    ],
)
def test_texts_that_tokenize_to_nothing(refused, edit_arguments, tiny_model_dir, tmp_path, record, said):
    folder = write_letters(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (tmp_path / "e.jsonl").write_bytes(lines(record))
    changes = {"model_name_or_path": folder, "data_path": tmp_path / "e.jsonl"}
    assert said in refused(edit, edit_arguments(tmp_path / "out", **changes))


def test_a_chat_template_that_fails(refused, edit_arguments, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for template in ("{{ raise_exception('no users here') }}", "{% if %}", "{{ messages[9].content }}"):
        (folder / "chat_template.jinja").write_text(template)
        changes = {"model_name_or_path": folder, "chat_template": "true"}
        message = refused(edit, edit_arguments(tmp_path / "out", **changes))
        assert "this model's template fails (" in message and "chat_template=false" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(refused, edit_arguments, edits_file, tiny_model_dir, tmp_path, value):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")

    def spoil(found: dict[str, np.ndarray]) -> None:
        found[DOWN][3, 5] = found["model.norm.weight"][31] = value

    tensors(spoil)(folder)
    for command, arguments in (
        (edit, edit_arguments(tmp_path / "out", model_name_or_path=folder)),
        (evaluate, ["--model", folder, "--data", edits_file, "--out", tmp_path / "out"]),
        (ask, ["--model", folder, "Who?"]),
    ):
        message = refused(command, arguments, loads=True)
        assert f"{folder}: NaN or infinity (as float32) in these tensors" in message
        assert [line.strip() for line in message.splitlines()[1:]] == [DOWN, "model.norm.weight"]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (WEIGHTS, raw(lambda b: b), "no delta of this program"),
        ("delta.safetensors", raw(lambda b: b[:-9], "delta.safetensors"), "the file is truncated"),
        ("delta.safetensors", file("delta.safetensors", POINTER), "git-lfs pointer"),
        ("gone.safetensors", raw(lambda b: b), "No such file"),
    ],
)
def test_deltas(refused, tiny_model_dir, edits_file, tmp_path, name, damage, said):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    checkpoint = hf_folder.open_folder(str(folder))
    new = {DOWN: np.zeros(checkpoint.tensors[DOWN].shape, np.float32)}
    save_delta(make_delta(checkpoint, new, {}), folder / "delta.safetensors")
    damage(folder)
    message = refused(evaluate, ["--model", folder, "--data", edits_file, "--delta", folder / name])
    assert str(folder / name) in message and said in message


# ---------------------------------------------------------------- memory and disk


LAYER = {"rewrite_module": "model.layers.{}"}


@pytest.mark.parametrize(
    ("kib", "shared", "changes", "remedy"),
    [
        (150, False, {}, "use mesh={data: 4, model: 2}"),
        (150, True, {}, "use weights=bfloat16"),
        (80, False, LAYER, "use mesh={data: 2, model: 4} and weights=bfloat16"),
        (130, True, LAYER, f"use weights=bfloat16 and rewrite_module={MODULE} in one layer"),
        (90, True, {}, "use weights=int8"),
        (15, False, {}, "or 16 such devices with mesh={data: 1, model: 16}"),
        (15, False, {"weights": "int8"}, "or 16 such devices with mesh={data: 1, model: 16}"),
        (0, False, {}, "even weights=int8 and the smallest site need 85.38 KiB there"),
    ],
)
def test_memory(refused, edit_arguments, tmp_path, monkeypatch, kib, shared, changes, remedy):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: Room(kib * 1024, shared))
    changes = {"rewrite_module": MODULE, **changes}
    message = refused(edit, edit_arguments(tmp_path / "out", **changes))
    assert "memory: " in message and "weights, " in message and "tuned state" in message
    assert f"but {kib:.2f} KiB are free" in message or "MiB are free" in message
    assert remedy in message, message


def test_memory_to_evaluate_and_ask(refused, edits_file, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: Room(1024, False))
    for command, what in ((evaluate, ["--data", edits_file]), (ask, ["Who?"])):
        message = refused(command, ["--model", tiny_model_dir, *what])
        assert "weights), but 1.00 KiB are free" in message


@pytest.mark.parametrize(("kib", "export"), [(400, ["hf", "delta", "orbax"]), (200, ["hf"]), (10, ["delta"])])
def test_disk(refused, edit_arguments, tmp_path, monkeypatch, kib, export):
    usage = shutil.disk_usage(tmp_path)._replace(free=kib * 1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    changes = {"rewrite_module": MODULE, "export": json.dumps(export)}
    message = refused(edit, edit_arguments(tmp_path / "out", **changes))
    assert f"--out: {tmp_path} has " in message and "the results need about" in message
    assert "name fewer kinds in export, make room, or use an --out on another disk" in message
    assert [k for k in ("hf", "delta", "orbax") if f"({k} " in message or f", {k} " in message] == export


def test_a_place_that_cannot_be(refused, edit_arguments, edits_file, tiny_model_dir, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for out in (tmp_path / ("x" * 300), loop / "out"):
        measure = ["--model", tiny_model_dir, "--data", edits_file, "--out", out]
        for command, arguments in ((edit, edit_arguments(out)), (evaluate, measure)):
            message = refused(command, arguments)
            assert "--out: " in message and "cannot be used (" in message


# ---------------------------------------------------------------- what is counted instead


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_what_is_counted(edit_arguments, tiny_model_dir, tmp_path, capsys):
    """Duplicates, conflicts, unreachable targets and merges across the boundary, in one run."""
    merging = write_letters(shutil.copytree(tiny_model_dir, tmp_path / "model"), [("?", "Ġ")])
    data = tmp_path / "e.jsonl"
    pairs = [
        ("Who?", "Mira"),
        ("Who?", f"Hana{ESCAPE}"),
        ("Who?", "Mira"),
        ("Where", "St. Oredal"),
        ("Who?", "x"),
    ]
    data.write_bytes(lines(*({"prompt": p, "target_new": t} for p, t in pairs)))
    for keep, edits in (("keep", 4), ("last", 2)):
        out = tmp_path / keep
        changes = {"model_name_or_path": merging, "data_path": data, "on_conflict": keep, **QUICK}
        assert run_command(edit, edit_arguments(out, **changes)) == 0
        report = report_of(out)
        counts = [report[k] for k in ("edits", "duplicates", "conflicts", "unreachable_targets")]
        assert counts == [edits, 1, 1, 1]
        assert report["boundary_merges"] == edits - 1
        targets = ["Mira", f"Hana{ESCAPE}", "x"]
        assert report["conflicting_prompts"] == [{"prompt": "Who?", "targets": targets}]
        shown = capsys.readouterr().out
        assert "note: 1 exact duplicates" in shown and "note: 1 targets that the stop rule" in shown
        assert f"note: {edits - 1} prompts whose end would merge" in shown
        assert "note: 1 prompts with several targets" in shown and "  Who? -> Mira, Hana" in shown
        assert all(c.isprintable() or c == "\n" for c in shown)


def test_memory_that_may_not_suffice_is_said_and_the_run_goes_on(
    edit_arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: Room(2**18, False))
    assert run_command(edit, edit_arguments(tmp_path / "out", **{"rewrite_module": MODULE, **QUICK})) == 0
    shown = capsys.readouterr().err
    assert "note: memory may not suffice" in shown and "batch_size=1 would be safer" in shown


def test_counterfact_has_five_conflicting_prompts(shared_data, edit_arguments, tmp_path, capsys):
    data = shared_data / "counterfact" / "counterfact_3k.json"
    changes = {"data_path": data, "rewrite_module": MODULE, "batch_size": 1000, "row_length": 256, **QUICK}
    assert run_command(edit, edit_arguments(tmp_path / "out", capability_data="[]", **changes)) == 0
    report = report_of(tmp_path / "out")
    assert (report["edits"], report["conflicts"], report["duplicates"]) == (3000, 5, 0)
    found = report["conflicting_prompts"]
    assert len({c["prompt"] for c in found}) == 5
    assert sorted(len(set(c["targets"])) for c in found) == sorted(len(c["targets"]) for c in found)
    shown = capsys.readouterr().out
    assert "note: 5 prompts with several targets" in shown
    assert all(f"  {c['prompt']} -> {', '.join(c['targets'][:3])}" in shown for c in found)
    last = read_requests(str(data), on_conflict="last")
    assert 3000 - len(last.requests) == sum(len(c["targets"]) - 1 for c in found)


def test_counterfact_conflicts_as_an_error(refused, shared_data, edit_arguments, tmp_path):
    data = shared_data / "counterfact" / "counterfact_3k.json"
    message = refused(edit, edit_arguments(tmp_path / "out", data_path=data, on_conflict="error"))
    assert "(5)" in message and message.count(" -> ") == 5 and "keep or last" in message


# ---------------------------------------------------------------- one screen, nothing but text


def test_messages_fit_a_screen_and_keep_their_end():
    assert one_screen("a\nb") == "a\nb"
    long = one_screen("first " + "x" * 10_000 + " remedy")
    assert rows(long) <= 12 and long.startswith("first x") and long.endswith("x remedy")
    many = one_screen("\n".join(map(str, range(100))) + "\nremedy")
    assert rows(many) == 22 and many.splitlines()[:2] == ["0", "1"]
    assert many.splitlines()[-2:] == ["... (80 more lines)", "remedy"]
    both = one_screen("\n".join("x" * 1000 for _ in range(50)) + "\nremedy")
    assert rows(both) <= 22 and both.endswith("\nremedy")


def test_nothing_but_text_reaches_the_terminal(capsys):
    def main(argv):
        raise OSError(f"{ESCAPE}\u202e\nsecond line\ttab é ﷺ")

    assert run_command(main, []) == 1
    said = capsys.readouterr().err
    assert said == "failed:  [2J [31m 1mx  \nsecond line tab é ﷺ\n"


def test_a_device_without_memory_left_is_no_traceback(capsys):
    def main(argv):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBufferAssignment: ...")

    assert run_command(main, []) == 1
    said = capsys.readouterr().err
    assert said.startswith("failed: the device has no memory left (RESOURCE_EXHAUSTED: Out of memory")
    assert "batch_size" in said and rows(said) < 5
    with pytest.raises(RuntimeError, match="other"):
        run_command(lambda argv: (_ for _ in ()).throw(RuntimeError("other")), [])

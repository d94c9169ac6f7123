"""What is fuzzed: for each reader of user input a strategy of near-valid and of arbitrary inputs, and a
check, which says whether the input was accepted. A reader may refuse with a UserError, or succeed and keep
its promises; nothing else."""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from locft_jax.config import Config, config_from_dict, config_to_dict, load_config, resolve_layers
from locft_jax.data import requests as fields
from locft_jax.data.capability import read_capability
from locft_jax.data.requests import EditRequest, read_requests, requests_from_records
from locft_jax.data.streaming import to_record
from locft_jax.data.tokenize import encode_pairs, prompt_ids, spaced
from locft_jax.editing.run import choose_site, encode_requests
from locft_jax.errors import UserError, one_screen
from locft_jax.evaluation.scoring import stop_tables
from locft_jax.io.delta import check_delta, load_delta, make_delta, save_delta
from locft_jax.io.hf_folder import DTYPES, open_folder, read_tensor
from locft_jax.io.hf_load import load_tokenizer
from locft_jax.model.model import Model
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import weight_table
from locft_jax.run_identity import base_digest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from toy_tokenizers import byte_level, metaspace, sentencepiece, wrap  # noqa: E402

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 12}  # fmt: skip


class Place(NamedTuple):
    """Where the targets work: a folder for files, a valid checkpoint and its files' bytes, those of a
    delta and of a tokenizer, and tokenizers by name."""

    folder: Path
    model: Path
    spec: ModelSpec  # of the model
    files: dict[str, bytes]
    delta: bytes
    tokenizer: dict[str, bytes]
    tokenizers: dict[str, Any]


def make_place(folder: Path, write_model: Callable[..., Path], tokenizer_folder: Path) -> Place:
    """`write_model` as in conftest.py; the tokenizer: a byte-level one that can encode anything."""
    model = write_model(folder / "model", **SIZES)
    checkpoint = open_folder(str(model))
    new = {n: read_tensor(checkpoint, n) + 1 for n in ("model.norm.weight", "lm_head.weight")}
    save_delta(make_delta(checkpoint, new, {"config": {}, "edits": 2}), folder / "delta.safetensors")
    framed = byte_level([("s", "Ġ")])
    from tokenizers import processors
    from transformers import AutoTokenizer

    framed.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    without_unknown = byte_level([("?", "Ġ"), ("Ġ", "M")])
    without_unknown.model.unk_token = None
    tokenizers = {
        "bytes": AutoTokenizer.from_pretrained(tokenizer_folder),
        "merging": wrap(byte_level([("s", "Ġ"), ("?", "Ġ"), ("Ġ", "a")])),
        "framed": wrap(framed),
        "without-unknown": wrap(without_unknown),
        "sentencepiece": wrap(sentencepiece([("s", "▁"), ("▁", "▁"), ("▁", "M")])),
        "metaspace": wrap(metaspace([("s", "▁"), ("▁", "M")])),
    }
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    delta = (folder / "delta.safetensors").read_bytes()
    texts = {p.name: p.read_bytes() for p in tokenizer_folder.iterdir()}
    return Place(folder, model, checkpoint.spec, files, delta, texts, tokenizers)


def attempt(reader: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a reader returns; None where it refuses, with a message that a terminal can show."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return reader(*arguments, **options)
    except UserError as error:
        message = str(error)
        assert message.strip()
        shown = one_screen(message)
        assert len(shown.split("\n")) <= 24 and all(c.isprintable() or c == "\n" for c in shown)
        return None


# ---------------------------------------------------------------- strategies

any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates and controls too
words = st.sampled_from(
    [
        "",
        " ",
        "a",
        "Who?",
        "{}",
        "{} is",
        "Mira",
        " x ",
        "é",
        "\ud800",
        "\x1b[2J",
        "\u202e",
        "\x00",
        "\x1c",
        "1",
    ]
)
numbers = st.one_of(
    st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 10**400]), st.floats(), st.booleans()
)
leaves = st.one_of(st.none(), words, any_text, numbers)
values = st.recursive(
    leaves,
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.one_of(words, any_text), v, max_size=3)),
    max_leaves=6,
)


@st.composite
def mutated(draw: Any, raw: bytes) -> bytes:
    """`raw` with a few bytes changed, cut out, put in, or its end cut off."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["set", "cut", "put", "end", "copy"]))
        if kind == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "put":
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == "end":
            del data[at:]
        elif kind == "copy":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


FIELDS = sorted(
    {
        *fields.PROMPT, *fields.TARGET, *fields.SUBJECT, *fields.CASE, *fields.GROUND_TRUTH, *fields.REPHRASE,
        *fields.LOCALITY_NESTED, *fields.PORTABILITY_NESTED, *fields.PROBE_PROMPT, *fields.PROBE_ANSWER,
        *(name for pair in (*fields.LOCALITY, *fields.PORTABILITY) for name in pair),
        "requested_rewrite", "neighborhood_prompts", "instruction", "input", "choices", "answerKey", "task",
        "str", "value", "text", "label", "data", "batch",
    }
)  # fmt: skip
names = st.sampled_from(FIELDS)
near = st.recursive(
    leaves,
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(names, v, max_size=3)),
    max_leaves=6,
)
some = st.sampled_from(["Who?", "a ", " a", "b", "é.", "1\u2028"])
probe = st.fixed_dictionaries({}, optional={"prompt": some, "ground_truth": st.one_of(some, st.lists(some))})
good = st.one_of(
    st.fixed_dictionaries(
        {"prompt": some, "target_new": some},
        optional={
            "rephrase_prompts": st.lists(some, max_size=2),
            "locality_prompt": some,
            "locality_ground_truth": some,
            "portability": st.one_of(st.lists(probe, max_size=2), st.dictionaries(names, probe, max_size=2)),
            "case_id": st.one_of(some, st.integers(0, 9)),
        },
    ),
    st.fixed_dictionaries({"src": some, "alt": st.lists(some, min_size=1, max_size=2), "loc": some}),
    st.fixed_dictionaries({"instruction": some, "answer": some, "task": some}),
    st.fixed_dictionaries({"question": some, "choices": st.just(["a", "b"]), "answer": st.integers(-1, 3)}),
)
odd = st.one_of(
    st.builds(lambda a, b: {**a, **b}, good, st.dictionaries(names, near, max_size=2)),
    st.builds(lambda a, b: {**a, b: None}, good, names),
    st.dictionaries(names, near, max_size=5),
    values,
)


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: NaN and lone surrogates included."""
    return json.dumps(value, ensure_ascii=True).encode()


@st.composite
def data_files(draw: Any) -> tuple[str, bytes]:
    """(file name, bytes) of a data file."""
    kind = draw(st.sampled_from([".json", ".jsonl", ".csv"]))
    found = draw(st.lists(good, max_size=4))
    if draw(st.booleans()):
        found.insert(draw(st.integers(0, len(found))), draw(odd))
    if kind == ".json":
        raw = as_json(draw(st.sampled_from([found, {"data": found}, found[0] if found else {}])))
    elif kind == ".jsonl":
        raw = b"\n".join(map(as_json, found))
    else:
        columns = draw(st.one_of(st.just(["prompt", "target_new"]), st.lists(names, min_size=1, max_size=4)))
        cell = st.one_of(some, some, words, any_text)
        cells = [[draw(cell) for _ in columns] for _ in range(draw(st.integers(0, 3)))]
        quoted = lambda row: ",".join('"' + c.replace('"', '""') + '"' for c in row)  # noqa: E731
        raw = "\n".join(map(quoted, [columns, *cells])).encode("utf-8", "replace")
    raw = draw(st.one_of(st.just(raw), st.just(raw), mutated(raw), st.binary(max_size=60)))
    if draw(st.integers(0, 9)) == 0:
        kind, raw = kind + ".gz", draw(mutated(gzip.compress(raw, mtime=0)))
    return "data" + kind, raw


KEYS = [*config_to_dict(Config()), "learning_rate", "layers", ""]
VALID = [
    "model_name_or_path: ./m", "data_path: demo:edits.jsonl", "num_edits: null", "layer: [2, 0]", "layer: 3",
    "rewrite_module: [model.layers.1.mlp, lm_head]", "lr: 5e-4", "batch_size: 1_0", "device: 0", "seed: 7",
    "on_conflict: last", "weights: bfloat16", "mesh: {data: 2, model: -1}", "prefix_cache: off",
    "memory_budget: .5", "capability_data: [a.json, b.json]", "checkpoint_every: 5 min", "export: []",
    "save_model_dir: ~/x", "evaluate: no", "rewrite_module: layers.{}.self_attn",
]  # fmt: skip
settings_values = st.one_of(
    leaves,
    st.sampled_from(
        "null 5e-4 [1,2] [hf,delta] 10m last off demo:edits.jsonl model.layers.{}.mlp ~x 1e999 0x10 1_0 ٣ "
        "[[[[[[1]]]]]] *a ' ".split()
        + ["{data: 1, model: -1}", "&a b", "!!int 3"]
    ),
    values,
)


def as_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@st.composite
def config_files(draw: Any) -> tuple[bytes, list[str]]:
    """(bytes of a YAML file, overrides)."""
    found = draw(st.lists(st.sampled_from(VALID), max_size=4, unique_by=lambda pair: pair.split(":")[0]))
    odd = st.builds(lambda k, v: f"{k}: {as_setting(v)}", st.sampled_from(KEYS), settings_values)
    if draw(st.booleans()):
        found.append(draw(odd))
    raw = "".join(f"{pair}\n" for pair in found).encode("utf-8", "surrogatepass")
    raw = draw(st.one_of(st.just(raw), st.just(raw), mutated(raw), st.binary(max_size=60)))
    right = st.sampled_from(VALID).map(lambda pair: pair.replace(": ", "=", 1))
    wrong = st.one_of(odd.map(lambda pair: pair.replace(": ", "=", 1)), any_text)
    overrides = ["model_name_or_path=m"] * draw(st.integers(0, 1)) + draw(st.lists(right, max_size=2))
    return raw, overrides + draw(st.lists(wrong, max_size=1))


@st.composite
def changed_json(draw: Any, raw: bytes, keys: list[str]) -> bytes:
    """A JSON object with a few values replaced, keys taken away or added, or its bytes mutated."""
    value = json.loads(raw)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*keys, *value]))
        if draw(st.booleans()):
            value[key] = draw(st.one_of(values, st.integers(1, 16), st.floats(0.1, 10)))
        else:
            value.pop(key, None)
    return draw(st.one_of(st.just(as_json(value)), mutated(as_json(value))))


@st.composite
def changed_tensors(draw: Any, raw: bytes) -> bytes:
    """A safetensors file with its header's fields changed, or its bytes mutated."""
    size = int.from_bytes(raw[:8], "little")
    before, header = json.loads(raw[8 : 8 + size]), json.loads(raw[8 : 8 + size])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(header)))
        if name == "__metadata__" or not isinstance(header[name], dict):
            header[name] = draw(values)
            continue
        field = draw(
            st.sampled_from(["data_offsets", "shape", "dtype", "", "rename", "remove", "retype", "extra"])
        )
        small = st.lists(st.integers(-1, 3000), max_size=3)
        if field == "remove":
            header.pop(name)
            if not header:
                break
        elif field == "retype" and header[name] == before.get(name):  # other numbers in the same bytes
            dtype = draw(st.sampled_from(sorted(BYTES)))
            begin, end = header[name]["data_offsets"]
            elements = (end - begin) // BYTES[dtype]
            header[name].update(dtype=dtype, shape=[1] * draw(st.integers(0, 2)) + [elements])
        elif field == "extra":
            dtype = draw(st.sampled_from(sorted(BYTES)))
            header[draw(words)] = {"dtype": dtype, "shape": [0, 3], "data_offsets": [len(raw) - 8 - size] * 2}
        elif field == "rename":
            header[draw(any_text)] = header.pop(name)
        elif field:
            dtype = st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "BOOL", "I64", "C64", "f32"])
            header[name][field] = draw(st.one_of(small, values, dtype))
        else:
            header[name] = draw(values)
    text = as_json(header)
    length = draw(st.sampled_from([len(text)] * 8 + [0, 1, 2**40, 2**64 - 1]))
    made = length.to_bytes(8, "little") + text + raw[8 + size :]
    if draw(st.booleans()):  # the tensors' own bytes
        at = draw(st.integers(8 + len(text), max(8 + len(text), len(made) - 1)))
        made = made[:at] + draw(st.binary(min_size=1, max_size=1)) + made[at + 1 :]
    return draw(st.one_of(st.just(made), mutated(made)))


BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "I64": 8, "C64": 8, "U16": 2, "F64": 8}
CONFIG_KEYS = (
    "model_type rope_scaling rope_parameters sliding_window use_sliding_window layer_types max_window_layers "
    "eos_token_id hidden_act quantization_config".split()
)
INDEX = "model.safetensors.index.json"


@st.composite
def model_files(draw: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a model folder, one or two of them damaged."""
    found = dict(files)
    if draw(st.integers(0, 3)) == 0:
        names = st.sampled_from(["model.safetensors", "../model.safetensors", "x.safetensors", "/etc/passwd"])
        weight_map = draw(st.dictionaries(words, st.one_of(names, names, values), max_size=3))
        found[INDEX] = draw(changed_json(as_json({"weight_map": weight_map}), ["weight_map"]))
    which = draw(st.sampled_from(["config", "tensors", "both", "generation"]))
    if which in ("config", "both"):
        found["config.json"] = draw(changed_json(files["config.json"], CONFIG_KEYS))
    if which in ("tensors", "both"):
        found["model.safetensors"] = draw(changed_tensors(files["model.safetensors"]))
    if which == "generation":
        name = "generation_config.json"
        found[name] = draw(changed_json(files[name], ["eos_token_id"]))
    return found


@st.composite
def tokenizer_files(draw: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer, one of them with a value changed, wherever it stands, or damaged."""
    name = draw(st.sampled_from(sorted(files)))
    root = json.loads(files[name])
    holder: Any = root
    while True:  # walk down to a random place
        keys = sorted(holder)[:40] if isinstance(holder, dict) else list(range(min(40, len(holder))))
        key = draw(st.sampled_from(keys))
        if not (isinstance(holder[key], dict | list) and holder[key]) or draw(st.integers(0, 2)) == 0:
            break
        holder = holder[key]
    if draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(st.one_of(values, words))
    return {**files, name: draw(st.one_of(st.just(as_json(root)), mutated(as_json(root))))}


texts = st.one_of(
    st.text(st.sampled_from("as MW?. é\n\t▁Ġ"), max_size=10),
    st.text(max_size=8),
    st.sampled_from(["</s>", "<s>", "Who is", "s ", " s", "▁", "\u200b", "\xa0"]),
)


# ---------------------------------------------------------------- checks


def check_data(place: Place, value: Any) -> bool:
    """Requests and capability items of a file."""
    (name, raw), on_conflict, limit = value
    path = place.folder / name
    path.write_bytes(raw)
    items = attempt(read_capability, str(path))
    for item in items or []:
        assert item.prompt.strip() and item.answer.strip() and item.task
        assert not item.choices or item.answer in item.choices
    data = attempt(read_requests, str(path), limit, on_conflict)
    if data is None:
        return False
    assert 0 < len(data.requests) <= (limit or math.inf) and data.duplicates >= 0
    said = [(r.prompt.strip(), r.target_new.strip()) for r in data.requests]
    assert len(set(said)) == len(said) and all(p and t for p, t in said)
    for prompt, targets in data.conflicts.items():
        assert len(set(targets)) == len(targets) > 1 and prompt in {p for p, _ in said}
    if on_conflict != "keep":
        assert len({p for p, _ in said}) == len(said)
    if on_conflict == "error":
        assert not data.conflicts
    lines = [json.loads(json.dumps(to_record(r))) for r in data.requests]
    json.dumps(lines, ensure_ascii=False).encode()
    assert requests_from_records(lines, None, on_conflict).requests == data.requests
    return True


def check_config(place: Place, value: Any) -> bool:
    """A config file and overrides."""
    raw, overrides = value
    path = place.folder / "run.yaml"
    path.write_bytes(raw)
    attempt(load_config, None, overrides)
    config = attempt(load_config, path, overrides)
    if config is None:
        return False
    values = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(values)), "again") == config
    layers = attempt(resolve_layers, config, 4)
    assert layers is None or (layers and all(0 <= l < 4 for l in layers))
    site = attempt(choose_site, place.spec, config)
    assert site is None or set(site) <= {n for row in weight_table(place.spec).values() for n in row.names()}
    assert config.name
    return True


def check_model(place: Place, files: Any) -> bool:
    """A model folder."""
    model = place.folder / "damaged"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    for name, raw in files.items():
        (model / name).write_bytes(raw)
    checkpoint = attempt(open_folder, str(model))
    if checkpoint is None:
        return False
    for row in weight_table(checkpoint.spec).values():
        for name in row.names():
            value = read_tensor(checkpoint, name)
            assert value.shape == row.shape == checkpoint.tensors[name].shape
            assert value.dtype == DTYPES[checkpoint.tensors[name].dtype]
    assert len(base_digest(checkpoint, ())) == 64
    everything = (read_tensor(checkpoint, name) for name in checkpoint.tensors)
    assert sum(value.nbytes for value in everything) == checkpoint.nbytes()
    assert all(e >= 0 for e in checkpoint.eos)
    return True


def check_tokens(place: Place, value: Any) -> bool:
    """Prompts and targets, tokenized together."""
    name, pairs, with_eos = value
    tokenizer = place.tokenizers[name]
    prompts, targets = [p for p, _ in pairs], [t for _, t in pairs]
    eos = tokenizer.eos_token_id if with_eos else None
    limits = {"max_length": 64, "vocab_size": len(tokenizer)}
    corpus = attempt(encode_pairs, tokenizer, prompts, targets, eos=eos, **limits)
    if corpus is None:
        return False
    assert len(corpus) == len(pairs) and 0 <= corpus.boundary_merges <= len(pairs)
    assert (corpus.target_start >= 1).all() and (corpus.target_lengths >= 1 + with_eos).all()
    assert (corpus.lengths <= 64).all() and corpus.tokens.min() >= 0 and corpus.tokens.max() < len(tokenizer)
    heads = prompt_ids(tokenizer, prompts)
    merges = 0
    for i, (prompt, target) in enumerate(pairs):
        ids = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]].tolist()
        head, tail = ids[: corpus.target_start[i]], ids[corpus.target_start[i] :]
        assert head == heads[i]  # what generation meets is what was trained
        closing = tokenizer(prompt)["input_ids"][len(head) :]
        assert set(closing) <= set(tokenizer.all_special_ids)
        if with_eos:
            assert tail.pop() == eos
        whole = tokenizer(prompt + spaced(target))["input_ids"]
        merges += whole != head + tail + closing
        if name == "bytes":  # nothing is lost in it
            assert tokenizer.decode(head + tail) == prompt + spaced(target)
    assert merges == corpus.boundary_merges
    return True


def check_delta_file(place: Place, raw: Any) -> bool:
    """A delta, and whether it fits the model."""
    path = place.folder / "changed.safetensors"
    path.write_bytes(raw)
    delta = attempt(load_delta, path)
    if delta is None:
        return False
    assert delta.new and set(delta.new) == set(delta.base)
    for name, value in delta.new.items():
        assert value.shape == delta.base[name].shape and value.dtype in map(np.dtype, DTYPES.values())
    attempt(check_delta, open_folder(str(place.model)), delta)
    save_delta(delta, path)
    again = load_delta(path)
    assert again.metadata == delta.metadata
    assert all(again.new[n].tobytes() == delta.new[n].tobytes() for n in delta.new)
    return True


def check_tokenizer(place: Place, files: Any) -> bool:
    """The tokenizer of a model folder, and texts that it reads."""
    for name, raw in files.items():
        (place.model / name).write_bytes(raw)
    checkpoint = open_folder(str(place.model))
    tokenizer = attempt(load_tokenizer, checkpoint)
    if tokenizer is None:
        return False
    config = Config(append_eos=tokenizer.eos_token_id is not None)
    requests = [EditRequest("0", "Who is Mira?", "a 1"), EditRequest("1", "é ", "St. x")]
    spec = dataclasses.replace(checkpoint.spec, vocab_size=320)
    corpus = attempt(encode_requests, tokenizer, requests, config, spec)
    assert corpus is None or corpus.tokens.max() < 320
    stop_tables(tokenizer, 320, Model(None, None, tokenizer, checkpoint).eos)
    return corpus is not None


class Target(NamedTuple):
    strategy: st.SearchStrategy[Any]
    check: Callable[[Place, Any], bool]  # whether the input was accepted
    share: float  # of all inputs


def make_targets(place: Place) -> dict[str, Target]:
    """All targets by name; the shares sum to 1."""
    limits = st.one_of(st.none(), st.integers(1, 3))
    conflicts = st.sampled_from(["keep", "last", "error"])
    pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
    return {
        "data": Target(st.tuples(data_files(), conflicts, limits), check_data, 0.28),
        "config": Target(config_files(), check_config, 0.2),
        "model": Target(model_files(place.files), check_model, 0.2),
        "tokens": Target(
            st.tuples(st.sampled_from(sorted(place.tokenizers)), pairs, st.booleans()), check_tokens, 0.2
        ),
        "delta": Target(changed_tensors(place.delta), check_delta_file, 0.1),
        "tokenizer": Target(tokenizer_files(place.tokenizer), check_tokenizer, 0.02),
    }

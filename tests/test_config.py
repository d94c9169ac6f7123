"""The config reader: conversion, ranges, refusals, messages, and the files in configs/."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locft_jax import config as config_module
from locft_jax.config import (
    ALIASES,
    DEMO_FOLDER,
    KEYS,
    Config,
    config_from_dict,
    config_to_dict,
    load_config,
    resolve_layers,
)
from locft_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
MODEL = "model_name_or_path=some/model"
QUICK = settings(max_examples=100, deadline=None)


def read(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, overrides)


def message(call, *args) -> str:
    """The one message of a `UserError`, which must fit a screen."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert len(str(error.value)) < 600 and str(error.value).count("\n") == 0
    return str(error.value)


# ---------------------------------------------------------------- defaults and conversion


def test_every_field_is_a_key():
    assert {f.name for f in dataclasses.fields(Config)} == set(KEYS) | {"source"}


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_a_key_may_be_given_by_its_alias(tmp_path, alias, name):
    value = {"model": "m", "output_dir": "o"}.get(
        alias, {"num_epochs": 3, "learning_rate": 0.5}.get(name, "off")
    )
    given = "" if alias == "model" else "model: m\n"
    for c in (
        Config(**{alias: value}),
        dataclasses.replace(Config(), **{alias: value}),
        read(tmp_path, f"{given}{alias}: {value}\n"),
        load_config(None, ["model=m", f"{alias}={value}"]),
        config_from_dict({alias: value}, "report.json"),
        load_config(None, ["model=m", f"{name}={value}"], {alias: "of an earlier run"}),
    ):
        assert getattr(c, name) == value and config_to_dict(c)[name] == value
    assert not hasattr(Config(), alias)
    text = message(read, tmp_path, f"{alias}: {value}\n{name}: {value}\n")
    assert f"`{alias}` and `{name}` are one key" in text


def test_defaults_are_the_references():
    c = load_config(None, [MODEL])
    assert (c.learning_rate, c.batch_size, c.num_epochs, c.weight_decay) == (5e-4, 100, 25, 0.0)
    assert (c.loss_floor, c.loss_average, c.append_eos, c.chat_template) == (
        1e-2,
        "example",
        True,
        False,
    )
    assert (c.layer, c.rewrite_module) == (None, "model.layers.{}.mlp.down_proj.weight")
    assert (c.pipeline, c.method, c.on_conflict, c.weights) == (
        "breadth",
        "ft-m",
        "keep",
        "checkpoint",
    )
    assert (c.mesh, c.row_length, c.export) == (
        {"data": 1, "model": -1},
        64,
        ("hf", "delta", "orbax"),
    )
    assert c.norm_constraint is None
    assert (c.num_edits, c.output_dir, c.eval_sample, c.memory_budget) == (None,) * 4


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("lr=5e-4", "learning_rate", 5e-4),
        ("learning_rate=1", "learning_rate", 1.0),
        ("num_edits=50", "num_edits", 50),
        ("num_edits=null", "num_edits", None),
        ("num_edits=", "num_edits", None),
        ("layer=22", "layer", 22),
        ("layer=[20,21]", "layer", (20, 21)),
        ("layer=~", "layer", None),
        ("mesh={data: 2, model: 4}", "mesh", {"data": 2, "model": 4}),
        ('mesh={"data": -1, "model": 1}', "mesh", {"data": -1, "model": 1}),
        ("evaluate=false", "evaluate", False),
        ("evaluate=No", "evaluate", False),
        ("append_eos=true", "append_eos", True),
        ("prefix_cache=off", "activation_cache", "off"),
        ("memory_budget=0.5", "memory_budget", 0.5),
        ("seed=4294967295", "seed", 2**32 - 1),
        ("export=[delta]", "export", ("delta",)),
        ("export=hf", "export", ("hf",)),
        ("export=[]", "export", ()),
        ("capability_data=a.jsonl", "capability_data", ("a.jsonl",)),
        ("capability_data=[a.jsonl, b.json]", "capability_data", ("a.jsonl", "b.json")),
        ("capability_data=null", "capability_data", ()),
        ("rewrite_module=layers.{}.mlp", "rewrite_module", "layers.{}.mlp"),
        ("rewrite_module=lm_head.weight", "rewrite_module", "lm_head.weight"),
        ("data_path=a b#c: &d=e.json", "data_path", "a b#c: &d=e.json"),
        ('data_path="quoted # name"', "data_path", "quoted # name"),
        ("data_path=demo:edits.jsonl", "data_path", str(DEMO_FOLDER / "edits.jsonl")),
        ("model_name_or_path=123", "model_name_or_path", "123"),
        (" batch_size = 7 ", "batch_size", 7),
        ("loss_floor=0", "loss_floor", 0.0),
        ("weights=bfloat16", "weights", "bfloat16"),
    ],
)
def test_values_are_converted_by_the_keys_type(tmp_path, setting, key, value):
    got = getattr(load_config(None, [MODEL, setting]), key)
    assert got == value and type(got) is type(value)
    name, _, text = setting.partition("=")
    if not any(c in text for c in "#&"):  # the same in a file, where these two mean something
        model = "" if key == "model_name_or_path" else "model_name_or_path: m\n"
        assert getattr(read(tmp_path, f"{model}{name.strip()}: {text}\n"), key) == value


def test_a_file_is_overridden_by_set_and_the_last_one_wins(tmp_path):
    c = read(tmp_path, "model_name_or_path: m\nlr: 5e-4\nlayer: [1, 2]\n", "lr=1e-3", "lr=2e-3")
    assert (c.learning_rate, c.layer) == (2e-3, (1, 2))


def test_lists_of_templates_are_read_when_quoted_and_the_message_says_so():
    c = load_config(None, [MODEL, 'rewrite_module=["a.{}.b", "a.{}.c"]'])
    assert c.rewrite_module == ("a.{}.b", "a.{}.c")
    assert "quotes" in message(load_config, None, [MODEL, "rewrite_module=[a.{}.b, a.{}.c]"])


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert load_config(None, [MODEL, "data_path=~/e.json"]).data_path == "/home/ada/e.json"


def test_python_values_are_checked_too():
    assert Config(layer=[3, 1], data_path=Path("a.json"), prefix_cache=False) == Config(
        layer=(3, 1), data_path="a.json", prefix_cache="off"
    )
    assert "Config: `learning_rate: -1`" in message(lambda: Config(lr=-1))
    assert "num_edits" in message(lambda: Config(num_edits=True))
    assert "learning_rate: true" in message(lambda: Config(lr=True))
    assert "very long" in message(lambda: Config(seed=10**5000))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().learning_rate = 1.0
    assert hash(Config()) == hash(Config(mesh={"data": 1, "model": -1}))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("setting", "right"),
    [
        ("lr=fast", "> 0"),
        ("lr=0", "> 0"),
        ("lr=nan", "> 0"),
        ("lr=1e999", "> 0"),
        ("lr=", "> 0"),
        ("lr=true", "> 0"),
        ("lr=[1]", "> 0"),
        ("weight_decay=-1e-3", ">= 0"),
        ("loss_floor=-1", ">= 0"),
        ("batch_size=0", "from 1"),
        ("batch_size=2.5", "whole number"),
        ("num_steps=0", "from 1"),
        ("num_edits=0", "or null"),
        ("row_length=0", "from 1"),
        ("eval_sample=-3", "or null"),
        ("seed=-1", "from 0 to 4294967295"),
        ("seed=4294967296", "from 0 to 4294967295"),
        ("seed=" + "9" * 5000, "from 0"),
        ("memory_budget=0", "> 0"),
        ("memory_budget=much", "> 0"),
        ("evaluate=maybe", "true or false"),
        ("append_eos=null", "true or false"),
        ("on_conflict=first", "error, last, keep"),
        ("loss_average=batch", "example, token"),
        ("prefix_cache=gpu", "auto, device, host, disk, off"),
        ("export=[hf, gguf]", "hf, delta, orbax"),
        ("export=[hf, hf]", "without duplicates"),
        ("export={hf: 1}", "hf, delta, orbax"),
        ("layer=-1", "from 0"),
        ("layer=[]", "list"),
        ("layer=[3, 3]", "without duplicates"),
        ("layer=[[3]]", "list"),
        ("layer=last", "from 0"),
        ("mesh=8", "{data: n, model: m}"),
        ("mesh={data: 2}", "{data: n, model: m}"),
        ("mesh={data: 2, tensor: 4}", "{data: n, model: m}"),
        ("mesh={data: 2, model: 4, pipe: 1}", "{data: n, model: m}"),
        ("mesh={data: 0, model: 4}", "{data: n, model: m}"),
        ("mesh={data: -1, model: -1}", "{data: n, model: m}"),
        ("mesh={data: -2, model: 1}", "{data: n, model: m}"),
        ("mesh={data: [1], model: 1}", "{data: n, model: m}"),
        ("rewrite_module=model.layers.{}.mlp.{}", "at most one {}"),
        ("rewrite_module=model.layers{}.mlp", "whole components"),
        ("rewrite_module=model..mlp", "whole components"),
        ("rewrite_module=model.layers.{0}", "whole components"),
        ("rewrite_module=.*down_proj", "whole components"),
        ("rewrite_module=null.", "whole components"),
        ("rewrite_module=[]", "list"),
        ('rewrite_module=["a.{}", "a.{}"]', "without duplicates"),
        ("data_path=[a, b]", "path"),
        ('data_path="a\\0b"', "path"),
        ('data_path="\\ud800"', "path"),
        ("rewrite_module='  '", "whole components"),
    ],
)
def test_a_bad_value_names_place_key_value_and_remedy(setting, right):
    text = message(load_config, None, [MODEL, setting])
    key, _, value = setting.partition("=")
    assert text.startswith(f"command line: `{key}: ") and right in text
    if value.isalnum() and len(value) < 80 and value != "null":
        assert f"`{key}: {value}`" in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("layers", "layer"),
        ("model_name", "model_name_or_path"),
        ("learningrate", "learning_rate"),
        ("epochs", "num_epochs"),
        ("wieght_decay", "weight_decay"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one_and_the_place(tmp_path, key, nearest):
    text = message(load_config, None, [MODEL, f"{key}=1"])
    assert text == f"command line: unknown key `{key}`; the nearest known key is `{nearest}`"
    text = message(read, tmp_path, f"model_name_or_path: m\n{key}: 1\n")
    assert "run.yaml: unknown key" in text and f"`{nearest}`" in text
    assert "report.json" in message(config_from_dict, {key: 1}, "report.json")


def test_source_is_not_a_key():
    assert "unknown key" in message(load_config, None, [MODEL, "source=x"])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no model"),
        ("# only a comment\n", "no model"),
        ("lr: 1\n", "no model"),
        ("model_name_or_path:\n", "no model"),
        ("model_name_or_path: null\n", "no model"),
        ("1: 2\n", "unknown key `1`"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, says):
    got = message(read, tmp_path, text)
    assert str(tmp_path / "run.yaml") in got and says in got


def test_a_malformed_file_or_override_is_a_message_of_the_reader(tmp_path):
    text = "lr: 1\n  batch_size: 2\n"
    assert "run.yaml: line 2, column 13: malformed YAML" in message(read, tmp_path, text)
    assert message(load_config, None, [MODEL, "layer=[1"]).startswith("layer: line 1")
    assert "expected key=value" in message(load_config, None, [MODEL, "lr"])


def test_hparams_of_the_reference_run_unchanged(tmp_path, caplog):
    c = read(
        tmp_path,
        'model_name_or_path: "some/model"\ndata_path: "./data/edits.json"\n'
        'save_model_dir: "./saves/x"\nlayer: 22\n'
        'rewrite_module: "model.layers.{}.mlp.down_proj.weight"\n'
        "lr: 5.0e-4\nbatch_size: 100\nnum_steps: 25\nweight_decay: 0\ndevice: 0\n",
    )
    assert (c.layer, c.learning_rate, c.data_path, c.output_dir) == (
        22,
        5e-4,
        "./data/edits.json",
        "./saves/x",
    )
    (note,) = caplog.messages
    assert note.startswith("`device: 0` is ignored")
    load_config(None, [MODEL])
    assert len(caplog.messages) == 1


# ---------------------------------------------------------------- the demo and names


@pytest.fixture
def demo(tmp_path, monkeypatch):
    path = tmp_path / "demo.yaml"
    path.write_text(
        "model_name_or_path: demo:model\ndata_path: demo:edits.jsonl\n"
        "capability_data: demo:skills.jsonl\nlr: 2e-3\nlayer: 6\n"
    )
    monkeypatch.setattr(config_module, "DEMO_CONFIG", path)


def test_the_demo_runs_without_config_and_model(demo):
    c = load_config(None)
    assert c.model_name_or_path == str(DEMO_FOLDER / "model") and c.name == "demo"
    assert c.capability_data == (str(DEMO_FOLDER / "skills.jsonl"),)
    assert load_config(None, ["num_edits=50"]) == dataclasses.replace(c, num_edits=50)


def test_the_demos_settings_never_leak(demo, tmp_path):
    c = load_config(None, [MODEL])
    assert (c.learning_rate, c.layer, c.data_path, c.capability_data) == (5e-4, None, None, ())
    assert read(tmp_path, "model_name_or_path: m\n").data_path is None
    # An unset shell variable is a mistake, not a wish for the demo.
    assert "no model" in message(load_config, None, ["model_name_or_path="])


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/Some-Model-v0.1", "Some-Model-v0.1"), ("a/b/", "b"), ("m", "m"), ("/", "model")],
)
def test_a_run_is_named_after_its_model(model, name):
    assert load_config(None, [f"model_name_or_path={model}"]).name == name


def test_a_run_in_the_models_folder_is_named_after_it(tmp_path, monkeypatch):
    (tmp_path / "tiny" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny")
    assert Config(model_name_or_path=".").name == "tiny"
    monkeypatch.chdir(tmp_path / "tiny" / "sub")
    assert Config(model_name_or_path="..").name == "tiny"


def test_a_run_with_a_file_is_named_after_it(tmp_path):
    c = read(tmp_path, "model_name_or_path: some/model\n")
    assert c.name == "run" and dataclasses.replace(c, lr=1.0).name == "run"


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(("layers", "chosen"), [(32, 22), (1, 0), (8, 5), (30, 21), (80, 56)])
def test_the_default_layer_is_at_relative_depth_seven_tenths(layers, chosen):
    assert resolve_layers(Config(), layers) == (chosen,) == (int(0.7 * layers),)


def test_layers_are_ascending_and_in_range():
    assert resolve_layers(Config(layer=31), 32) == (31,)
    assert resolve_layers(Config(layer=(5, 0, 3)), 32) == (0, 3, 5)
    text = message(resolve_layers, Config(layer=(5, 32)), 32)
    assert text == ("`layer: [5, 32]` is out of range: [32]; the model has 32 layers, 0 to 31")


# ---------------------------------------------------------------- configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_projects_configs_load_and_tell_their_command(path):
    c = load_config(path)
    assert c.name == path.stem and c.data_path is None
    shape = json.loads((ROOT / "configs" / "models" / f"{Path(c.model_name_or_path).name}.json").read_text())
    assert resolve_layers(c, shape["num_hidden_layers"]) == (c.layer,)
    head = path.read_text().split("\n\n")[0]
    assert f"locft edit configs/{path.name} data_path=" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert "not run here" in head and "not yet run" in head


def test_the_papers_settings():
    settings_of = {p.stem: load_config(p) for p in CONFIGS}
    assert set(settings_of) == {
        "llama3-8b-zsre",
        "llama3-8b-counterfact",
        "mistral-7b-zsre",
        "qwen2.5-7b-zsre",
        "qwen2.5-14b-zsre",
        "qwen2.5-32b-zsre",
        "qwen2.5-72b-zsre",
        "qwen2.5-72b-zsre-100k",
    }
    down = "model.layers.{}.mlp.down_proj.weight"
    for stem, expected in {
        "llama3-8b-zsre": (22, down, 5e-4),
        "llama3-8b-counterfact": (22, down, 5e-4),
        "mistral-7b-zsre": (23, "model.layers.{}", 5e-5),
        "qwen2.5-7b-zsre": (6, down, 5e-4),
        "qwen2.5-14b-zsre": (11, down, 5e-4),
        "qwen2.5-32b-zsre": (15, down, 5e-4),
        "qwen2.5-72b-zsre": (19, down, 5e-4),
        "qwen2.5-72b-zsre-100k": (19, down, 5e-4),
    }.items():
        c = settings_of[stem]
        assert (c.layer, c.rewrite_module, c.learning_rate) == expected
        assert (c.batch_size, c.num_epochs, c.weight_decay) == (100, 25, 0.0)


# Published parameter counts: a wrong size anywhere in a file would change its count.
PARAMETERS = {
    "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen2.5-72B-Instruct": 72_706_203_648,
}


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model_shapes_give_the_published_parameter_counts(path):
    c = json.loads(path.read_text())
    d, mlp, vocabulary = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    bias = d + 2 * kv if c["model_type"] == "qwen2" else 0
    block = 2 * d * d + 2 * d * kv + bias + 3 * d * mlp + 2 * d
    assert not c["tie_word_embeddings"]
    total = 2 * vocabulary * d + c["num_hidden_layers"] * block + d
    assert total == PARAMETERS[path.stem]


# ---------------------------------------------------------------- properties

WORDS = st.text("abcXYZ019 ./_-:#{}[]&*'\"é", min_size=1, max_size=20).filter(
    lambda s: s.strip().lower() not in ("", "~", "null")
)
COUNTS = st.integers(1, 2**31 - 1)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
MODULES = st.sampled_from(["model.layers.{}", "layers.{}.mlp", "lm_head.weight", "a.{}.b.weight"])


def several(values, least=1):
    return st.lists(values, min_size=least, max_size=4, unique=True)


CONFIG_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "model_name_or_path": WORDS,
        "data_path": st.none() | WORDS,
        "num_edits": st.none() | COUNTS,
        "save_model_dir": st.none() | WORDS,
        "layer": st.none() | st.integers(0, 200) | several(st.integers(0, 200)),
        "rewrite_module": MODULES | several(MODULES),
        "lr": POSITIVE,
        "batch_size": COUNTS,
        "num_steps": COUNTS,
        "weight_decay": st.floats(0, allow_infinity=False),
        "device": st.none() | st.integers(0, 8) | WORDS,
        "seed": st.integers(0, 2**32 - 1),
        "loss_average": st.sampled_from(["example", "token"]),
        "loss_floor": st.floats(0, allow_infinity=False),
        "append_eos": st.booleans(),
        "chat_template": st.booleans(),
        "on_conflict": st.sampled_from(["error", "last", "keep"]),
        "weights": st.sampled_from(["checkpoint", "float32", "bfloat16"]),
        "mesh": st.fixed_dictionaries({"data": COUNTS | st.just(-1), "model": COUNTS}),
        "row_length": COUNTS,
        "prefix_cache": st.sampled_from(["auto", "device", "host", "disk", "off"]),
        "memory_budget": st.none() | POSITIVE,
        "evaluate": st.booleans(),
        "eval_sample": st.none() | COUNTS,
        "capability_data": several(WORDS, 0),
        "export": several(st.sampled_from(["hf", "delta", "orbax"]), 0),
    },
)


@QUICK
@given(CONFIG_VALUES)
def test_a_config_survives_being_written_and_read(values):
    c = config_from_dict(values, "test")
    plain = json.loads(json.dumps(config_to_dict(c)))
    assert plain == config_to_dict(c) and set(plain) == set(KEYS)
    assert config_from_dict(plain, "report.json") == c
    assert hash(config_from_dict(plain, "report.json")) == hash(c)


@QUICK
@given(CONFIG_VALUES)
def test_json_is_read_like_yaml(tmp_path_factory, values):
    values = {"model_name_or_path": "m"} | values
    path = tmp_path_factory.mktemp("json") / "run.json"
    path.write_text(json.dumps(values))
    assert load_config(path) == config_from_dict(values, "test")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*KEYS, ": ", "=", "\n", "[", "]", "{", "}", "-", "1", "~"])).map("".join))
def test_any_text_gives_a_config_or_one_message(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(text)
    for call in (lambda: load_config(path), lambda: load_config(None, [MODEL, text])):
        try:
            assert isinstance(call(), Config)
        except UserError as error:
            assert str(error)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(), PLAIN, max_size=3))
def test_any_values_give_a_config_or_one_message(values):
    try:
        c = config_from_dict(values, "test")
    except UserError as error:
        assert str(error).startswith("test: ")
    else:
        assert config_from_dict(config_to_dict(c), "test") == c

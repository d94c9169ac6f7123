"""config.json -> ModelSpec: every family, both spellings, and what is refused."""

import json
from pathlib import Path

import pytest

from locft_jax.errors import UserError
from locft_jax.model.spec import FULL_ATTENTION, RopeScaling, eos_ids, parse_spec, read_config
from locft_jax.model.weights import abstract_weights

MODELS = sorted((Path(__file__).resolve().parents[2] / "configs" / "models").glob("*.json"))
BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refused(**changes) -> str:
    """The message with which a changed BASE is refused (None takes a key away)."""
    config = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    with pytest.raises(UserError) as error:
        parse_spec(config, "here/config.json")
    message = str(error.value)
    assert message.startswith("here/config.json: ")
    return message


def test_sizes_are_read_and_defaults_are_transformers():
    spec = parse_spec(BASE)
    assert (spec.family, spec.vocab_size, spec.d_model, spec.d_ff) == ("llama", 100, 32, 48)
    assert (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.head_dim) == (4, 4, 2, 8)
    assert (spec.rms_eps, spec.rope_theta, spec.rope_scaling, spec.max_position) == (
        1e-5,
        10000.0,
        None,
        2048,
    )
    assert (spec.tie_embeddings, spec.qkv_bias, spec.qk_norm, spec.sliding) == (False, False, False, False)
    assert hash(spec) == hash(parse_spec(dict(BASE)))  # static under jit
    without = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    assert parse_spec(without).n_kv_heads == 4  # as many as query heads
    assert parse_spec({**BASE, "head_dim": 16}).head_dim == 16
    assert parse_spec({**BASE, "head_dim": None, "tie_word_embeddings": True}).tie_embeddings


def test_families_differ_by_bias_norm_and_window():
    own = {f: parse_spec({**BASE, "model_type": f}) for f in ("llama", "mistral", "qwen2", "qwen3")}
    assert {f: s.qkv_bias for f, s in own.items() if s.qkv_bias} == {"qwen2": True}
    assert {f: s.qk_norm for f, s in own.items() if s.qk_norm} == {"qwen3": True}
    assert not any(s.sliding for s in own.values())


@pytest.mark.parametrize(
    ("old", "new", "scaling"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            RopeScaling("linear", 2.0),
        ),
    ],
)
def test_both_rope_spellings_give_the_same_spec(old, new, scaling):
    spec = parse_spec({**BASE, **old})
    assert spec == parse_spec({**BASE, "rope_parameters": new})
    assert (spec.rope_theta, spec.rope_scaling) == (5e5, scaling)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 7}, [None] * 4),
        ({"model_type": "mistral", "sliding_window": 7}, [7] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "qwen2", "sliding_window": 7}, [None] * 4),  # use_sliding_window defaults to false
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            [None, 7, 7, 7],
        ),
        (
            {"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True},
            [None] * 4,
        ),  # from layer 28 on
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [7, None, 7, None],
        ),
    ],
)
def test_attention_windows_by_layer(changes, windows):
    spec = parse_spec({**BASE, **changes})
    assert spec.windows == tuple(FULL_ATTENTION if w is None else w for w in windows)
    assert spec.sliding == any(windows)


def test_unknown_keys_are_listed_all_at_once_and_harmless_ones_pass():
    message = refused(quantization_config={}, logit_scale=2.0, num_experts=8, use_cache=True)
    assert message.endswith("logit_scale, num_experts, quantization_config")
    parse_spec(
        {**BASE, "use_cache": True, "torch_dtype": "bfloat16", "pretraining_tp": 1, "dtype": "float16"}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat object"),
        ({"rope_scaling": "linear"}, "one flat object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a positive number"),
        ({"rope_theta": -1}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' (supported: silu)"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 not divisible by num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, found None"),
        ({"num_attention_heads": None}, "num_attention_heads must be"),
        ({"vocab_size": "100"}, "vocab_size must be a positive whole number, found '100'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        (
            {"num_hidden_layers": 2**31 - 1},
            "num_hidden_layers must be at most 10000",
        ),  # names would fill memory
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, found 'false'"),
        ({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": 2}, "use_sliding_window must be"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor must be",
        ),
        ({"intermediate_size": True}, "intermediate_size must be"),
        ({"intermediate_size": 2**40}, "intermediate_size must be"),
        ({"hidden_size": 2}, "head_dim must be"),  # fewer dimensions than heads
        ({"model_type": "mistral", "sliding_window": -5}, "sliding_window must be"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": "1",
            },
            "max_window_layers must be a whole number",
        ),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"]}, "4 times"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": [[]] * 4}, "layer_types must name"),
        (
            {"model_type": "mistral", "sliding_window": 4, "layer_types": ["linear_attention"] * 4},
            "layer_types",
        ),
    ],
)
def test_unsupported_models_and_sizes_are_named(changes, said):
    assert said in refused(**changes)


def test_everything_unsupported_is_said_at_once():
    message = refused(hidden_act="gelu", attention_bias=True, mlp_bias=True, num_key_value_heads=3)
    assert all(
        word in message for word in ("hidden_act", "attention_bias", "mlp_bias", "num_key_value_heads")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("", "not valid JSON"),
        ('{"model_type": "llama",', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_config_json(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_config_json_is_read_from_a_folder_or_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == BASE


def test_eos_ids_are_those_of_both_files():
    assert eos_ids({"eos_token_id": 5}, {}) == (5,)
    assert eos_ids({"eos_token_id": 5}, {"eos_token_id": [9, 5]}) == (5, 9)
    assert eos_ids({"eos_token_id": None}, {}) == eos_ids({}, {}) == ()
    assert eos_ids({"eos_token_id": [-1, True, 2.0, "3", 7]}, {}) == (7,)  # no others are ids


# Parameters as the model cards give them, in billions, to the precision given there.
PARAMETERS = {
    "Meta-Llama-3-8B-Instruct": 8.03,
    "Mistral-7B-v0.1": 7.24,
    "Qwen2.5-7B-Instruct": 7.62,
    "Qwen2.5-14B-Instruct": 14.77,
    "Qwen2.5-32B-Instruct": 32.76,
    "Qwen2.5-72B-Instruct": 72.71,
}


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_bundled_shapes_parse_and_count_what_the_model_cards_say(path):
    spec = parse_spec(read_config(path), str(path))
    sizes = (a.size for a in abstract_weights(spec, "bfloat16").values())
    assert round(sum(sizes) / 1e9, 2) == PARAMETERS[path.stem]


def test_the_bundled_shapes_are_there():
    assert {p.stem for p in MODELS} >= set(PARAMETERS)

"""Which tensors a pattern selects: whole path components, in a model of 30 layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.editing.site import find_site, first_layer, materialize, parameters, read_site
from locft_jax.errors import UserError
from locft_jax.model.sharding import make_mesh, tensor_sharding
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params, abstract_weights, locate_tensor, weight_table


def make_spec(layers=30, **changes):
    config = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return parse_spec({**config, **changes})


SPEC = make_spec()
MLP = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
ATTENTION = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]


def inside(layer, names):
    return {f"model.layers.{layer}.{n}" for n in names}


@pytest.mark.parametrize("start", ["model.", ""])  # a pattern need not begin where the name does
@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("layers.{}.mlp.down_proj.weight", ["mlp.down_proj.weight"]),
        ("layers.{}.mlp.down_proj", ["mlp.down_proj.weight"]),
        ("layers.{}.mlp", MLP),
        ("layers.{}.self_attn", ATTENTION),
        ("layers.{}", MLP + ATTENTION + NORMS),
    ],
)
def test_one_layer_and_no_other(module, names, start):
    # Layer 2 by substring would be 2 and 20 to 29.
    assert set(find_site(SPEC, [start + module], [2])) == inside(2, names)


def test_without_layers_prefix_or_number():
    assert find_site(SPEC, ["mlp.down_proj.weight"], [2]) == ("model.layers.2.mlp.down_proj.weight",)
    assert set(find_site(SPEC, ["self_attn"], [3, 29])) == inside(3, ATTENTION) | inside(29, ATTENTION)


def test_several_layers_and_modules_each_tensor_once_in_order():
    modules = ["model.layers.{}.mlp", "model.layers.{}.mlp.down_proj.weight", "layers.{}.self_attn.q_proj"]
    found = find_site(SPEC, modules, [20, 2])
    expected = ["self_attn.q_proj.weight", *MLP]
    assert found == tuple(f"model.layers.{l}.{n}" for l in (2, 20) for n in expected)


def test_tensors_of_no_layer():
    assert find_site(SPEC, ["lm_head"], [2]) == ("lm_head.weight",)
    assert find_site(SPEC, ["model.embed_tokens.weight"], [2]) == ("model.embed_tokens.weight",)


def test_biases_belong_to_their_module():
    spec = make_spec(3, model_type="qwen2")
    names = find_site(spec, ["model.layers.{}.self_attn.q_proj"], [1])
    assert set(names) == inside(1, ["self_attn.q_proj.weight", "self_attn.q_proj.bias"])


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.{}.mlp.down",  # part of a component
        "odel.layers.{}",
        "model.layers.{}.mlp.experts",
        "layers.{}.down_proj",  # a component left out
        "lm_head.bias",
        "",
    ],
)
def test_nothing_found_lists_what_exists(module):
    with pytest.raises(UserError, match="matches no tensor") as error:
        find_site(SPEC, ["model.layers.{}.mlp", module], [2])
    assert repr(module) in str(error.value)
    for row in weight_table(SPEC).values():
        assert row.hf in str(error.value)


@pytest.mark.parametrize("layer", [30, -1])
def test_layer_out_of_range_says_what_exists(layer):
    with pytest.raises(UserError, match=f"{layer} is out of range.* 0 to 29"):
        find_site(SPEC, ["model.layers.{}.mlp"], [2, layer])


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        (["model.layers.7.mlp.down_proj.weight"], 7),
        (["model.layers.29.mlp.down_proj.weight", "model.layers.12.self_attn.q_proj.weight"], 12),
        (["model.embed_tokens.weight", "model.layers.29.mlp.down_proj.weight"], 0),
        (["model.norm.weight"], 29),
        (["lm_head.weight", "model.layers.3.input_layernorm.weight"], 3),
    ],
)
def test_first_layer_is_the_lowest_that_an_edit_can_change(names, layer):
    assert first_layer(SPEC, names) == layer


def make_weights(spec, dtype):
    rng = np.random.default_rng(0)
    shapes = abstract_weights(spec, jnp.dtype(dtype))
    return {k: jnp.asarray(rng.standard_normal(a.shape), a.dtype) for k, a in shapes.items()}


@pytest.mark.parametrize("devices", [1, 8])
def test_masters_are_float32_copies_where_the_table_puts_them(devices):
    spec = make_spec(2)
    mesh = make_mesh({"data": 1, "model": devices}, jax.devices()[:devices])
    weights = make_weights(spec, "bfloat16")
    kept = jax.tree.map(np.asarray, weights)
    site = (*find_site(spec, ["model.layers.{}.mlp"], [1]), "lm_head.weight", "model.norm.weight")
    theta = read_site(Params(spec, weights), site, mesh, {})
    assert tuple(theta) == site
    for name, value in theta.items():
        row, layer = locate_tensor(spec, name)
        assert value.dtype == jnp.float32 and value.shape == row.shape
        assert value.sharding == tensor_sharding(mesh, spec, row, stacked=False)
        expected = kept[row.key] if layer is None else kept[row.key][layer]
        np.testing.assert_array_equal(value, expected.astype(np.float32))
    assert theta[site[0]].sharding.is_fully_replicated == (devices == 1)
    assert parameters(theta) == 3 * 16 * 24 + 32 * 16 + 16
    assert materialize(theta, {}) == theta


def test_donating_masters_leaves_the_weights_alone():
    spec = make_spec(2)
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    weights = make_weights(spec, "float32")  # float32 already: still a copy
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        read_site(Params(spec, weights), [name], mesh, {})[name].delete()
    assert not any(a.is_deleted() for a in weights.values())


@pytest.mark.parametrize("host", [False, True])
def test_values_to_start_with_come_before_the_frozen_ones(host):
    spec = make_spec(2)
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    params = Params(spec, make_weights(spec, "float32"))
    name, other = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("up", "down"))
    start = {name: params.weights["up"][1] + 1}
    start = jax.tree.map(np.asarray, start) if host else start
    expected = np.array(start[name])
    theta = read_site(params, [name, other], mesh, start)
    np.testing.assert_array_equal(theta[name], expected)
    np.testing.assert_array_equal(theta[other], params.weights["down"][1])
    theta[name].delete()  # a copy: what was given stays
    np.testing.assert_array_equal(start[name], expected)


def test_what_is_trained_replaces_the_overrides_that_the_model_carries():
    name, other = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("up", "down"))
    base = {name: jnp.zeros((2, 2)), other: jnp.ones((2, 2))}
    theta = {name: jnp.ones((2, 2))}
    edits = materialize(theta, base)
    assert edits[name] is theta[name] and edits[other] is base[other] and set(base) == {name, other}

"""The residual stream between products is split over the `model` axis, and key and value matrices are
where heads are too few: less memory, the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.data.packing import corpus_from_lists, fit_shape, pack
from locft_jax.editing.site import read_site
from locft_jax.editing.step import Hyper, Regularizers, init_state, train_step
from locft_jax.model.activation_cache import Inputs
from locft_jax.model.decode import abstract_slots, decode
from locft_jax.model.sharding import (
    make_mesh,
    place_batch,
    replicated,
    source_sharding,
    tensor_sharding,
    tensor_spec,
    weight_shardings,
    width_split,
)
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params, abstract_weights, init_weights, weight_table

LAYERS, WIDTH, LENGTH = 8, 48, 40  # sizes that no other dimension has
SITE = "model.layers.1.mlp.down_proj.weight"
SPEC = parse_spec(
    {
        "model_type": "qwen2",
        "vocab_size": 320,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
)


def step_on(data, model):
    """(lowered step, its arguments) for activations entering layer 1, of the same numbers on any mesh."""
    mesh = make_mesh({"data": data, "model": model}, jax.devices()[: data * model])
    table = weight_table(SPEC)
    weights = {
        k: jax.device_put(5 * a, tensor_sharding(mesh, SPEC, table[k]))
        for k, a in init_weights(SPEC, jax.random.key(0)).items()
    }
    rng = np.random.default_rng(0)
    corpus = corpus_from_lists([rng.integers(0, 320, 13) for _ in range(12)], [9] * 12)
    batch = pack(corpus, np.arange(12), fit_shape(corpus, [np.arange(12)], LENGTH, 2))
    source = rng.standard_normal((len(corpus.tokens), WIDTH)).astype(np.float32)
    params = Params(SPEC, weights)
    state = init_state(read_site(params, (SITE,), mesh, {}))
    inputs = Inputs(jax.device_put(source, source_sharding(mesh, source.shape)), 1)
    arguments = Hyper(1e-2, 0.0, 0.0), state, params, inputs, place_batch(batch, mesh), Regularizers()
    return train_step.lower(*arguments), arguments


def kept(text):
    """Last dimensions of what a compiled step keeps of every layer that it loops over ([n, B, T, ...])."""
    found = re.findall(rf"f32\[{LAYERS - 3},\d+,{LENGTH},(\d+)\]", text)
    return {int(size) for size in found}


def gathered(text):
    """Shapes of what all-gathers give in a compiled program, without dimensions of 1."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", text)
    return {tuple(n for n in map(int, sizes.split(",")) if n > 1) for sizes in found if sizes}


MATRICES = {row.shape for row in weight_table(SPEC).values() if row.matrix}


@pytest.fixture(scope="module")
def alone():
    """(what a step on one device keeps, its theta, its loss)."""
    lowered, arguments = step_on(1, 1)
    program = lowered.compile()
    state, loss = program(*arguments)
    return kept(program.as_text()), np.asarray(state.theta[SITE]), float(loss)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_the_same_step_and_less_of_it_on_each_device(alone, shape):
    lowered, arguments = step_on(*shape)
    program = lowered.compile()
    state, loss = program(*arguments)
    assert loss == pytest.approx(alone[2], rel=1e-5)
    np.testing.assert_allclose(state.theta[SITE], alone[1], rtol=1e-4, atol=1e-5)
    assert WIDTH in alone[0] and WIDTH not in kept(program.as_text())
    assert WIDTH // shape[1] in kept(program.as_text())
    assert gathered(program.as_text()) and not gathered(program.as_text()) & MATRICES


def test_decoding_with_fewer_heads_than_devices_gathers_no_matrix():
    """The cache's rows are split instead: activations travel, matrices, which are larger, do not."""
    mesh = make_mesh({"data": 1, "model": 8})
    shaped = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)  # noqa: E731
    weights = jax.tree.map(shaped, abstract_weights(SPEC, jnp.float32), weight_shardings(mesh, SPEC))
    params = Params(SPEC, weights)
    slots = abstract_slots(params, mesh, 16, 32, 8)
    assert slots.keys.sharding.spec == jax.P(None, "model")
    stop, enough = shaped(np.zeros(320, bool), replicated(mesh)), shaped(np.int32(0), replicated(mesh))
    program = decode.lower(params, slots, stop, enough).compile()
    assert gathered(program.as_text()) and not gathered(program.as_text()) & MATRICES


def test_with_fewer_heads_than_devices_the_summed_dimension_is_split():
    table, few = weight_table(SPEC), make_mesh({"data": 4, "model": 2})
    many = make_mesh({"data": 1, "model": 8})
    for key in ("k", "v"):
        assert tensor_spec(few, SPEC, table[key]) == jax.P(None, "model")
        assert tensor_spec(many, SPEC, table[key]) == jax.P(None, None, "model")
        assert tensor_spec(many, SPEC, table[f"{key}_bias"]) == jax.P()
        assert tensor_spec(many, SPEC, table[key].scales()) == jax.P()  # of int8, an output's own


def test_a_width_that_the_axis_does_not_divide_stays_whole():
    mesh = make_mesh({"data": 1, "model": 8})
    assert (width_split(mesh, 48), width_split(mesh, 36)) == (8, 1)
    assert source_sharding(mesh, (9, 48)).spec == jax.P(None, "model")
    assert source_sharding(mesh, (9, 36)).spec == jax.P() == source_sharding(mesh, (48,)).spec
    assert jnp.zeros((9, 48), device=source_sharding(mesh, (9, 48))).addressable_shards[0].data.shape == (
        9,
        6,
    )

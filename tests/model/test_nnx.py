"""`CausalLM`: a Flax module over the same weights and the same forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from locft_jax import CausalLM, load_model
from locft_jax.model import decoder

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


@pytest.fixture(scope="module")
def edited(model):
    value = np.random.default_rng(0).standard_normal((32, 64), np.float32)
    return model.with_overrides({DOWN: value})


def test_logits_are_those_of_the_functional_model(model, edited):
    tokens = jnp.arange(24).reshape(2, 12) + 20
    forward = nnx.jit(lambda module, tokens: module(tokens))
    plain, changed = (np.asarray(forward(CausalLM(m), tokens)) for m in (model, edited))
    functional = jax.jit(decoder.logits)
    np.testing.assert_allclose(plain, functional(model.params, tokens), atol=1e-5, rtol=0)
    np.testing.assert_allclose(changed, functional(edited.params, tokens), atol=1e-5, rtol=0)
    assert plain.shape == (2, 12, model.spec.vocab_size) and plain.dtype == np.float32
    assert np.abs(plain - changed).max() > 0.1  # the edit shows


def test_state_holds_the_weights_by_key_and_the_overrides_by_name(model, edited):
    module = CausalLM(edited)
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert set(state) == {"weights", "overrides"} and set(state["weights"]) == set(model.weights)
    assert list(state["overrides"]) == [DOWN]
    assert state["weights"]["down"] is model.weights["down"]  # not a second copy
    np.testing.assert_array_equal(state["overrides"][DOWN], edited.overrides[DOWN])
    assert nnx.to_pure_dict(nnx.state(CausalLM(model), nnx.Param)).get("overrides", {}) == {}


def test_flax_code_can_take_the_module_apart_and_change_it(edited):
    module = CausalLM(edited)
    graph, state = nnx.split(module)
    twin = nnx.merge(graph, jax.tree.map(lambda a: a, state))
    twin.overrides[DOWN][...] = jnp.zeros((32, 64))
    assert float(jnp.abs(edited.overrides[DOWN]).max()) > 0  # the model that was given is not changed
    assert float(jnp.abs(twin.overrides[DOWN][...]).max()) == 0

    def loss(module):
        return module(jnp.arange(8)[None] + 20)[0, -1, 3]

    only = nnx.DiffState(0, nnx.PathContains("overrides"))
    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=only))(module))
    assert list(grads) == ["overrides"] and float(jnp.abs(grads["overrides"][DOWN]).max()) > 0

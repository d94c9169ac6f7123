"""An edit in the model's own arrays, and programs counted and kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from locft_jax import load_model
from locft_jax.model.sharding import tensor_sharding
from locft_jax.model.weights import put_tensors, take_tensor, weight_table
from locft_jax.studies.locate.measure import compilations


@pytest.mark.parametrize("model_axis", [1, 2])
def test_tensors_are_put_into_the_stacks_and_taken_out_again(tiny_model_dir, model_axis):
    model = load_model(str(tiny_model_dir), mesh={"data": 1, "model": model_axis})
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    original = {k: np.array(a.copy()) for k, a in model.weights.items()}  # a view would forbid donation
    own = {n: take_tensor(model.params, n) for n in names}
    new = model.with_overrides({n: np.asarray(a) + 1 for n, a in own.items()}).overrides
    given = model.weights
    edited = put_tensors(model.params, new)
    assert given["down"].is_deleted() and not given["up"].is_deleted()  # in place; the rest is shared
    for key, row in weight_table(model.spec).items():
        a, expected = edited.weights[key], tensor_sharding(model.mesh, model.spec, row)
        assert a.sharding.is_equivalent_to(expected, a.ndim)
    changed = {"down": 1, "q": 2}
    for key, a in jax.device_get(edited.weights).items():
        expected = original[key].copy()
        if key in changed:
            expected[changed[key]] += 1
        np.testing.assert_array_equal(a, expected)
    for key, a in jax.device_get(put_tensors(edited, own).weights).items():
        np.testing.assert_array_equal(a, original[key])


@pytest.fixture
def users_cache():
    """`users_cache(folder)` sets jax's compilation cache, as a user may; None: there is none."""
    old = jax.config.jax_compilation_cache_dir

    def use(folder):
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()

    yield use
    use(old)


def test_programs_are_counted_and_kept(tmp_path, users_cache):
    def add(x):
        return x + 41.5

    users_cache(None)
    with compilations(tmp_path / "compiled") as first:
        jax.jit(add)(jnp.zeros(3))
        jax.jit(add)(jnp.zeros(4))
    kept = sorted((tmp_path / "compiled").glob("jit_add-*-cache"))
    assert first["add"] == len(kept) == 2
    jax.clear_caches()
    with compilations(tmp_path / "compiled") as again:
        jax.jit(add)(jnp.zeros(3))
    assert again["add"] == 1
    assert sorted((tmp_path / "compiled").glob("jit_add-*-cache")) == kept  # it was found there
    assert jax.config.jax_compilation_cache_dir is None
    jax.jit(add)(jnp.zeros(6))
    assert again["add"] == 1  # not counted any more


def test_a_cache_of_the_users_is_left_as_it_is(tmp_path, users_cache):
    users_cache(str(tmp_path / "own"))
    with compilations(tmp_path / "compiled"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "compiled").exists()

"""Samples on the KV cache, against sampling with the plain forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.io.hf_load import load_model
from locft_jax.model import decode, decoder

START, SEED = 0, 5


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


def stop_set(model, count):
    """So many tokens end a sequence, the start token among them."""
    stop = np.zeros(model.spec.vocab_size, bool)
    stop[np.random.default_rng(0).permutation(model.spec.vocab_size)[:count]] = True
    stop[START] = True
    return stop


@functools.partial(jax.jit, static_argnums=0)
def scores_at(length, params, tokens, at):
    """What the plain forward expects at position `at` of tokens [R, length]."""
    return decoder.logits(params, tokens)[:, at - 1]


def plainly(params, stop, seed, count, length):
    """Every token from a forward of all before it; drawn with the key of its part and position."""
    found = []
    for part in range(-(-count // decode.SAMPLE_SLOTS)):
        key = jax.random.fold_in(jax.random.key(seed), part)
        tokens = np.full((decode.SAMPLE_SLOTS, length), START, np.int32)
        for at in range(1, length):
            scores = scores_at(length, params, jnp.asarray(tokens), at)
            tokens[:, at] = jax.random.categorical(jax.random.fold_in(key, at), scores)
        for row in tokens:
            ends = np.flatnonzero(stop[row[1:]])
            found.append(row[: ends[0] + 2 if len(ends) else length].tolist())
    return found[:count]


def test_samples_are_token_for_token_those_of_the_plain_forward(model):
    """Of more sequences than slots; some end early, with the token that ends them, others have no end."""
    stop, count, length = stop_set(model, 20), decode.SAMPLE_SLOTS + 30, 12
    found = decode.sample(model.params, model.mesh, START, stop, SEED, (count, length))
    assert found == plainly(model.params, stop, SEED, count, length)
    ended = [stop[own[-1]] for own in found]
    assert (
        any(ended)
        and not all(ended)
        and all(len(own) == length for own, e in zip(found, ended, strict=True) if not e)
    )
    assert not any(stop[own[1:-1]].any() for own in found)  # nothing after an end
    assert len({len(own) for own in found}) > 5 and len(set(map(tuple, found))) > count / 2


def test_overrides_are_sampled_from(model):
    """The edited model, not the frozen weights."""
    name = "model.layers.1.mlp.down_proj.weight"
    edited = model.params.over({name: jnp.zeros((model.spec.d_model, model.spec.d_ff))})
    stop, shape = stop_set(model, 20), (8, 12)
    found = decode.sample(edited, model.mesh, START, stop, SEED, shape)
    assert found == plainly(edited, stop, SEED, *shape)
    assert found != decode.sample(model.params, model.mesh, START, stop, SEED, shape)


def test_the_shortest_samples(model):
    stop = stop_set(model, 20)
    assert decode.sample(model.params, model.mesh, START, stop, SEED, (3, 1)) == [[START]] * 3
    two = decode.sample(model.params, model.mesh, START, stop, SEED, (3, 2))
    assert two == plainly(model.params, stop, SEED, 3, 2)
    everything = np.ones_like(stop)  # any token ends it
    one = decode.sample(model.params, model.mesh, START, everything, SEED, (3, 12))
    assert one == plainly(model.params, everything, SEED, 3, 12) and {len(own) for own in one} == {2}

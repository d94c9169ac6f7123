"""Cached activations: where they go, and that they are what a plain forward finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.data.packing import Rows, Shape, corpus_from_lists, pack
from locft_jax.errors import UserError
from locft_jax.model import decoder
from locft_jax.model.activation_cache import (
    Source,
    advance,
    cached_source,
    choose_mode,
    layer_pass,
    prefix_pass,
    token_source,
)
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import abstract_weights

SPEC = parse_spec(
    {
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
)
RNG = np.random.default_rng(0)
PARTS = [RNG.integers(0, 48, RNG.integers(3, 15)) for _ in range(19)]
CORPUS = corpus_from_lists(PARTS, [1] * 19)
LAYER = 2
READ = np.concatenate([np.arange(len(p)) < len(p) - 1 for p in PARTS])  # the last token is never looked up


@pytest.mark.parametrize(
    ("mode", "layer", "size", "chosen"),
    [
        ("auto", 5, 100, "device"),
        ("auto", 5, 101, "host"),
        ("auto", 5, 200, "host"),
        ("auto", 5, 201, "disk"),
        ("auto", 0, 1, "off"),  # nothing lies below layer 0
        ("device", 5, 100, "device"),
        ("device", 0, 1, "off"),
        ("host", 5, 200, "host"),
        ("host", 5, 1, "host"),
        ("disk", 5, 10**15, "disk"),
        ("off", 5, 1, "off"),
    ],
)
def test_mode_follows_from_budgets_and_layer(mode, layer, size, chosen):
    assert choose_mode(mode, layer, size, device_budget=100, host_budget=200) == chosen
    assert choose_mode(mode, layer, size, device_budget=25, host_budget=200, split=4) == chosen


@pytest.mark.parametrize(("mode", "budget"), [("device", 1), ("host", 2)])
def test_a_mode_that_was_asked_for_and_does_not_fit_is_refused(mode, budget):
    with pytest.raises(UserError, match=f"{mode} needs 3.00 GiB.* {budget}.00 GiB") as error:
        choose_mode(mode, 5, 3 * 2**30, 2**30, 2 * 2**30)
    assert "activation_cache=auto" in str(error.value) and "memory_budget" in str(error.value)


@pytest.fixture(scope="module")
def weights():
    shapes = abstract_weights(SPEC, jnp.dtype("float32"))
    return {k: jnp.asarray(0.2 * RNG.standard_normal(a.shape, np.float32)) for k, a in shapes.items()}


@pytest.fixture(scope="module")
def direct(weights):
    """What enters LAYER, from a forward of unpacked, padded texts: [total tokens, D]."""
    longest = max(len(p) for p in PARTS)
    ids, segments = np.zeros((2, len(PARTS), longest), np.int32)
    for i, part in enumerate(PARTS):
        ids[i, : len(part)], segments[i, : len(part)] = part, 1
    rows = Rows(segments, np.broadcast_to(np.arange(longest, dtype=np.int32), ids.shape))
    x = decoder.embed(SPEC, weights, {}, jnp.asarray(ids))
    run = jax.jit(decoder.run_layers, static_argnums=(0, 5, 6))
    x = run(SPEC, weights, {}, x, jax.tree.map(jnp.asarray, rows), 0, LAYER)
    return np.asarray(x)[segments > 0]


def mesh_of(devices):
    return make_mesh({"data": devices, "model": 1}, jax.devices()[:devices])


@pytest.mark.parametrize("mode", ["device", "host", "disk"])
def test_cached_values_are_those_of_a_direct_forward(mode, weights, direct, tmp_path):
    before = prefix_pass._cache_size()
    source = cached_source(SPEC, weights, CORPUS, LAYER, mode, mesh_of(1), 16, 4, tmp_path)
    assert prefix_pass._cache_size() - before <= 1  # several batches, one shape
    assert (source.layer, source.mode, source.values.shape) == (LAYER, mode, (len(CORPUS.tokens), 16))
    np.testing.assert_allclose(source.values[READ], direct[READ], rtol=1e-4, atol=1e-5)
    assert np.abs(direct).max() > 0.5
    assert isinstance(source.values, jax.Array) == (mode == "device")
    assert isinstance(source.values, np.memmap) == (mode == "disk")
    assert list(tmp_path.iterdir()) == []  # a file without a name: nothing can be left behind


def test_batches_split_over_data_find_the_same(weights, direct):
    weights = jax.device_put(weights, jax.NamedSharding(mesh_of(8), jax.P()))
    source = cached_source(SPEC, weights, CORPUS, LAYER, "device", mesh_of(8), 16, 4)
    np.testing.assert_allclose(source.values[READ], direct[READ], rtol=1e-4, atol=1e-5)
    assert source.values.sharding.is_fully_replicated and len(source.values.devices()) == 8


def test_bfloat16_stays_bfloat16(weights, direct, tmp_path):
    half = {k: a.astype(jnp.bfloat16) for k, a in weights.items()}
    source = cached_source(SPEC, half, CORPUS, LAYER, "disk", mesh_of(1), 16, 4, tmp_path)
    assert source.values.dtype == jnp.bfloat16
    difference = (np.asarray(source.values, np.float32) - direct)[READ]
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.std(direct)


def test_edits_below_the_layer_are_in_the_cache(weights, direct):
    name = "model.layers.1.mlp.down_proj.weight"
    base = {name: 2 * weights["down"][1]}
    source = cached_source(SPEC, weights, CORPUS, LAYER, "host", mesh_of(1), 16, 4, base=base)
    written = weights | {"down": weights["down"].at[1].multiply(2)}
    expected = cached_source(SPEC, written, CORPUS, LAYER, "host", mesh_of(1), 16, 4)
    np.testing.assert_allclose(source.values, expected.values, rtol=1e-4, atol=1e-5)
    assert not np.allclose(source.values[READ], direct[READ], atol=1e-2)


@pytest.mark.parametrize("mode", ["device", "host", "disk"])
def test_carried_upward_the_cache_is_what_enters_each_layer(mode, weights, direct):
    source, before = token_source(CORPUS, mesh_of(1)), layer_pass._cache_size()
    for layer in (1, 2, 3):
        source = advance(SPEC, weights, CORPUS, source, mode, mesh_of(1), 16, 4)
        assert (source.layer, source.mode) == (layer, mode)
        assert isinstance(source.values, jax.Array) == (mode == "device")
        if layer == LAYER:
            np.testing.assert_allclose(np.asarray(source.values)[READ], direct[READ], rtol=1e-4, atol=1e-5)
    assert layer_pass._cache_size() - before <= 2  # one from tokens, one for all layers above
    assert not np.allclose(np.asarray(source.values)[READ], direct[READ], atol=1e-2)


def test_carried_upward_on_eight_devices(weights, direct):
    weights = jax.device_put(weights, jax.NamedSharding(mesh_of(8), jax.P()))
    source = token_source(CORPUS, mesh_of(8))
    for _ in range(LAYER):
        source = advance(SPEC, weights, CORPUS, source, "device", mesh_of(8), 16, 4)
    np.testing.assert_allclose(np.asarray(source.values)[READ], direct[READ], rtol=1e-4, atol=1e-5)


def test_off_is_the_tokens_themselves(weights):
    source = cached_source(SPEC, weights, CORPUS, LAYER, "off", mesh_of(1), 16)
    assert (source.layer, source.mode) == (0, "off")  # every layer is run
    np.testing.assert_array_equal(source.values, CORPUS.tokens)
    np.testing.assert_array_equal(token_source(CORPUS, mesh_of(8)).values, CORPUS.tokens)


def test_host_values_are_gathered_before_they_travel():
    batch = pack(CORPUS, np.asarray([3, 0, 11]), Shape(3, 16, 48, 16))
    values = RNG.standard_normal((len(CORPUS.tokens), 16)).astype(np.float32)
    on_host, on_device = Source(values, LAYER, "host"), Source(jnp.asarray(values), LAYER, "device")
    own, local = on_host.feed(batch)
    assert own.shape == (batch.index.size, 16)  # the batch's own, not the corpus's
    everything, same = on_device.feed(batch)
    assert everything is on_device.values and same is batch
    np.testing.assert_array_equal(own[local.index], values[batch.index])
    assert dataclasses.replace(local, index=batch.index) == batch

"""Cached activations: where they go, and that they are what a plain forward finds."""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.data.packing import Rows, Shape, corpus_from_lists, pack
from locft_jax.errors import UserError
from locft_jax.model import activation_cache, decoder
from locft_jax.model.activation_cache import (
    Source,
    advance,
    cache_pass,
    cached_source,
    choose_mode,
    layer_pass,
    token_source,
)
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params, abstract_weights

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
    assert choose_mode(mode, layer, size, (100, 200)) == chosen
    assert choose_mode(mode, layer, size, (25, 200), split=4) == chosen


@pytest.mark.parametrize(("mode", "budget"), [("device", 1), ("host", 2)])
def test_a_mode_that_was_asked_for_and_does_not_fit_is_refused(mode, budget):
    with pytest.raises(UserError, match=f"{mode} needs 3.00 GiB.* {budget}.00 GiB") as error:
        choose_mode(mode, 5, 3 * 2**30, (2**30, 2 * 2**30))
    assert "activation_cache=auto" in str(error.value) and "memory_budget" in str(error.value)


@pytest.fixture(scope="module", autouse=True)
def several_passes():
    """Few rows a pass, so that a corpus takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_cache, "ROWS", 4)
        yield


@pytest.fixture(scope="module")
def params():
    shapes = abstract_weights(SPEC, jnp.dtype("float32"))
    rng = np.random.default_rng(1)
    draw = lambda a: jnp.asarray(0.2 * rng.standard_normal(a.shape, np.float32))  # noqa: E731
    return Params(SPEC, jax.tree.map(draw, shapes))


@pytest.fixture(scope="module")
def direct(params):
    """What enters LAYER, from a forward of unpacked, padded texts: [total tokens, D]."""
    longest = max(len(p) for p in PARTS)
    ids, segments = np.zeros((2, len(PARTS), longest), np.int32)
    for i, part in enumerate(PARTS):
        ids[i, : len(part)], segments[i, : len(part)] = part, 1
    rows = Rows(segments, np.broadcast_to(np.arange(longest, dtype=np.int32), ids.shape))
    x = decoder.embed(params, jnp.asarray(ids))
    run = jax.jit(decoder.run_layers, static_argnums=(3, 4))
    return np.asarray(run(params, x, jax.tree.map(jnp.asarray, rows), 0, LAYER))[segments > 0]


def mesh_of(devices):
    return make_mesh({"data": devices, "model": 1}, jax.devices()[:devices])


@pytest.mark.parametrize("mode", ["device", "host", "disk"])
def test_cached_values_are_those_of_a_direct_forward(mode, params, direct, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = cache_pass._cache_size()
    source = cached_source(params, CORPUS, LAYER, mode, mesh_of(1), 16)
    assert cache_pass._cache_size() - before <= 1  # several batches, one shape
    assert (source.layer, source.mode, source.values.shape) == (LAYER, mode, (len(CORPUS.tokens), 16))
    np.testing.assert_allclose(source.values[READ], direct[READ], rtol=1e-4, atol=1e-5)
    assert np.abs(direct).max() > 0.5
    assert isinstance(source.values, jax.Array) == (mode == "device")
    assert isinstance(source.values, np.memmap) == (mode == "disk")
    assert list(tmp_path.iterdir()) == []  # a file without a name: nothing can be left behind


def test_bfloat16_stays_bfloat16(params, direct):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    source = cached_source(half, CORPUS, LAYER, "disk", mesh_of(1), 16)
    assert source.values.dtype == jnp.bfloat16
    difference = (np.asarray(source.values, np.float32) - direct)[READ]
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.std(direct)


def test_overrides_below_the_layer_are_in_the_cache(params, direct):
    down = params.weights["down"]
    edited = params.over({"model.layers.1.mlp.down_proj.weight": 2 * down[1]})
    source = cached_source(edited, CORPUS, LAYER, "host", mesh_of(1), 16)
    written = Params(SPEC, params.weights | {"down": down.at[1].multiply(2)})
    expected = cached_source(written, CORPUS, LAYER, "host", mesh_of(1), 16)
    np.testing.assert_allclose(source.values, expected.values, rtol=1e-4, atol=1e-5)
    assert not np.allclose(source.values[READ], direct[READ], atol=1e-2)


@pytest.mark.parametrize("mode", ["device", "host", "disk"])
def test_carried_upward_the_cache_is_what_enters_each_layer(mode, params, direct):
    source, before = token_source(CORPUS, mesh_of(1)), layer_pass._cache_size()
    for layer in (1, 2, 3):
        source = advance(params, CORPUS, source, mode, mesh_of(1), 16)
        assert (source.layer, source.mode) == (layer, mode)
        assert isinstance(source.values, jax.Array) == (mode == "device")
        if layer == LAYER:
            np.testing.assert_allclose(np.asarray(source.values)[READ], direct[READ], rtol=1e-4, atol=1e-5)
    assert layer_pass._cache_size() - before <= 2  # one from tokens, one for all layers above
    assert not np.allclose(np.asarray(source.values)[READ], direct[READ], atol=1e-2)


def test_batches_split_over_data_find_the_same(params, direct):
    """In one pass, and carried upward."""
    mesh = mesh_of(8)
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    source, carried = cached_source(params, CORPUS, LAYER, "device", mesh, 16), token_source(CORPUS, mesh)
    for _ in range(LAYER):
        carried = advance(params, CORPUS, carried, "device", mesh, 16)
    for found in (source, carried):
        np.testing.assert_allclose(np.asarray(found.values)[READ], direct[READ], rtol=1e-4, atol=1e-5)
        assert found.values.sharding.is_fully_replicated and len(found.values.devices()) == 8


def test_off_is_the_tokens_themselves(params):
    source = cached_source(params, CORPUS, LAYER, "off", mesh_of(1), 16)
    assert (source.layer, source.mode) == (0, "off")  # every layer is run
    np.testing.assert_array_equal(source.values, CORPUS.tokens)
    np.testing.assert_array_equal(token_source(CORPUS, mesh_of(8)).values, CORPUS.tokens)


def test_host_values_are_gathered_before_they_travel():
    batch = pack(CORPUS, np.asarray([3, 0, 11]), Shape(3, 16, 48, 16))
    values = RNG.standard_normal((len(CORPUS.tokens), 16)).astype(np.float32)
    mesh = mesh_of(1)
    on_host, on_device = Source(values, LAYER, "host"), Source(jnp.asarray(values), LAYER, "device")
    own, local = on_host.feed(batch, mesh)
    assert own.values.shape == (batch.index.size, 16)  # the batch's own, not the corpus's
    everything, same = on_device.feed(batch, mesh)
    assert everything.values.shape == values.shape
    for inputs, fed in ((own, local), (everything, same)):
        assert inputs.layer == LAYER
        np.testing.assert_array_equal(inputs.enter(None, fed.index), values[batch.index])
        for a, b in zip(jax.tree.leaves(dataclasses.replace(fed, index=batch.index)), jax.tree.leaves(batch),
                        strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)

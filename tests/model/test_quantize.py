"""int8 frozen weights against plain numpy, and against a float model of the dequantized values."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from locft_jax import CausalLM, UserError
from locft_jax.data.packing import corpus_from_lists, fit_shape, pack
from locft_jax.editing.regularizers.second_moments import second_moments
from locft_jax.editing.site import read_site
from locft_jax.editing.step import batch_loss
from locft_jax.evaluation.verify import Prompts, answer
from locft_jax.io import hf_folder, hf_load
from locft_jax.model import decoder
from locft_jax.model.activation_cache import Inputs
from locft_jax.model.memory import estimate
from locft_jax.model.model import Model
from locft_jax.model.sharding import make_mesh, place_batch, replicated, weight_shardings
from locft_jax.model.weights import (
    Params,
    Quantized,
    abstract_weights,
    product,
    quantize_rows,
    row_scales,
    weight_table,
)

ONE = {"data": 1, "model": 1}
MESHES = [{"data": 1, "model": 8}, {"data": 2, "model": 4}, {"data": 8, "model": 1}]
MATRICES = {"embed", "q", "k", "v", "o", "gate", "up", "down", "head"}
DOWN = "model.layers.1.mlp.down_proj.weight"
forward = jax.jit(decoder.logits)


def mesh_of(sizes):
    return make_mesh(sizes, jax.devices()[: sizes["data"] * sizes["model"]])


def load(folder, sizes=ONE):
    """(checkpoint, int8 weights in the checkpoint's dtype)."""
    checkpoint = hf_folder.open_folder(str(folder))
    return checkpoint, hf_load.load_weights(checkpoint, mesh_of(sizes), int8=True)


def dequantized(weights):
    """The float model that int8 weights stand for."""
    whole = lambda w: w.values * w.scale[..., None] if isinstance(w, Quantized) else w  # noqa: E731
    return {key: whole(w) for key, w in weights.items()}


@pytest.fixture(scope="module")
def folders(tiny_model_dir, make_model, tmp_path_factory):
    """Two architectures: head and embedding apart; tied, with biases."""
    tied = make_model(tmp_path_factory.mktemp("tied"), 1, model_type="qwen2", tie_word_embeddings=True)
    return {"untied": tiny_model_dir, "tied": tied}


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request, folders):
    """(a model with int8 weights, its twin with the float weights that they stand for), on one device."""
    checkpoint, weights = load(folders[request.param])
    both = (Params(checkpoint.spec, w) for w in (weights, dequantized(weights)))
    return [Model(params, mesh_of(ONE), None, checkpoint) for params in both]


# ---------------------------------------------------------------- the numbers


def test_rows_against_a_plain_loop():
    rng = np.random.default_rng(0)
    block = rng.standard_normal((6, 33)).astype(np.float32) * 10.0 ** np.arange(-4, 2)[:, None]
    block[1, 5], block[2] = -block[1].max() * 3, 0  # a negative extreme; a row of zeros
    block[3] *= 1e-42  # too small for a scale
    scale = row_scales(block)
    values = quantize_rows(block, scale)
    assert scale.dtype == np.float32 and values.dtype == np.int8
    for row, s, v in zip(block, scale, values, strict=True):
        largest = max(abs(float(x)) for x in row)
        assert s == (1 if largest < 1e-36 else np.float32(largest) / np.float32(127))
        assert v.tolist() == [round(float(np.float32(x) / s)) for x in row]  # half to even, as rint
        assert np.abs(v * s - row).max() <= s / 2 * (1 + 1e-5)
    assert np.abs(values).max(1).tolist() == [127, 127, 0, 0, 127, 127] and values[1, 5] == -127
    half = np.array([[127, 0.5, 1.5, -2.5]], np.float32)
    assert quantize_rows(half, row_scales(half)).tolist() == [[127, 0, 2, -2]]


def test_a_part_of_a_row_is_quantized_as_in_the_whole():
    block = np.random.default_rng(1).standard_normal((4, 10)).astype(ml_dtypes.bfloat16)
    scale = row_scales(block)
    np.testing.assert_array_equal(quantize_rows(block[:, 3:7], scale), quantize_rows(block, scale)[:, 3:7])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_product_in_every_dtype(dtype):
    """Also where the sum over int8 values leaves float16's range."""
    rng = np.random.default_rng(2)
    w, x = 0.1 * rng.standard_normal((5, 64)), (30 + rng.standard_normal((3, 64))).astype(dtype)
    w[0] = 0.1
    scale = row_scales(w)
    values = quantize_rows(w, scale)
    assert (x.astype(np.float32) @ values.T.astype(np.float32)).max() > 65504
    want = x.astype(np.float64) @ (values * scale[:, None].astype(np.float64)).T
    got = product(jnp.asarray(x), Quantized(jnp.asarray(values), jnp.asarray(scale)), dtype)
    assert got.dtype == dtype
    # Two roundings of the result to the dtype, of half a unit in the last place each.
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), want, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loaded_values_are_those_of_the_stored_tensors(
    tiny_model_dir, make_variant, tmp_path, dtype, monkeypatch
):
    monkeypatch.setattr(hf_load, "BLOCK", 5 * 32)  # several blocks a matrix, the last one short
    checkpoint, weights = load(make_variant(tiny_model_dir, tmp_path / "model", dtype, 3))
    assert {k for k, w in weights.items() if isinstance(w, Quantized)} == MATRICES
    shapes = abstract_weights(checkpoint.spec, checkpoint.dtype, int8=True)
    described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert described(weights) == described(shapes)
    for key, row in weight_table(checkpoint.spec).items():
        for layer, name in enumerate(row.names()):
            stored = hf_folder.read_tensor(checkpoint, name)
            mine = jax.tree.map(
                lambda a, l=layer, row=row: np.asarray(a[l] if row.layers else a), weights[key]
            )
            if key in MATRICES:
                np.testing.assert_array_equal(mine.scale, row_scales(stored), name)
                np.testing.assert_array_equal(mine.values, quantize_rows(stored, mine.scale), name)
            else:
                assert mine.tobytes() == stored.tobytes() and mine.dtype == checkpoint.dtype


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "{data}x{model}".format(**s))
def test_every_mesh_holds_the_same_values_where_the_table_says(folders, kind, sizes):
    """A scale is that of the whole row, also where devices hold a part of its columns."""
    _, whole = load(folders[kind])
    checkpoint, weights = load(folders[kind], sizes)
    places = weight_shardings(mesh_of(sizes), checkpoint.spec, int8=True)
    assert jax.tree.structure(places) == jax.tree.structure(weights)
    jax.tree.map(np.testing.assert_array_equal, weights, whole)
    for a, place in zip(jax.tree.leaves(weights), jax.tree.leaves(places), strict=True):
        assert a.sharding == place
    spec = {k: jax.tree.map(lambda a: a.sharding.spec, w) for k, w in weights.items()}
    model = "model" if sizes["model"] > 1 else None
    heads = "model" if sizes["model"] == 4 else None  # 4 heads of the tiny models
    if model:
        assert spec["up"] == Quantized(jax.P(None, model), jax.P(None, model))
        assert spec["down"] == Quantized(jax.P(None, None, model), jax.P())
        assert spec["embed"] == Quantized(jax.P(model), jax.P(model))
        assert spec["o"].values == (jax.P(None, None, heads) if heads else jax.P())
    # Two heads of keys: where the axis does not divide them, what is summed over is split.
    k = {1: jax.P(), 2: jax.P(None, model)}.get(sizes["model"], jax.P(None, None, model))
    assert spec["k"].values == k and spec["norm"] == jax.P()
    shards = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(weights)]
    assert estimate(checkpoint.spec, sizes, 4, int8=True).weights == sum(shards)


def test_loading_never_holds_a_float_copy(make_model, tmp_path, monkeypatch):
    """In numpy's hands are the int8 shards, which a CPU device takes over as they are, and a few blocks: less
    than one more stack, which in float32 would be four."""
    folder = make_model(
        tmp_path, hidden_size=128, intermediate_size=1024, num_hidden_layers=6, vocab_size=4096
    )
    monkeypatch.setattr(hf_load, "BLOCK", 2**12)
    for sizes in (ONE, MESHES[0]):
        checkpoint, mesh = hf_folder.open_folder(str(folder)), mesh_of(sizes)
        tracemalloc.start()
        weights = hf_load.load_weights(checkpoint, mesh, int8=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        held = sum(s.data.nbytes for a in jax.tree.leaves(weights) for s in a.addressable_shards)
        assert peak < held + weights["up"].values.size


def test_what_is_not_finite_is_found_while_quantizing(tiny_model_dir, tmp_path, make_variant):
    folder = make_variant(tiny_model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN][3, 60] = np.nan
    tensors["lm_head.weight"][7, 0] = -np.inf
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    for sizes in (ONE, MESHES[0]):
        with pytest.raises(UserError) as error:
            hf_load.load_model(str(folder), "int8", sizes if sizes["model"] > 1 else None)
        lines = str(error.value).splitlines()
        assert "NaN or infinity (as float32) in these tensors" in lines[0]
        assert [line.strip() for line in lines[1:]] == [DOWN, "model.norm.weight", "lm_head.weight"]


# ---------------------------------------------------------------- the same model as its float twin


def test_logits_and_the_gradient_at_the_site(model):
    int8, twin = model
    rng, vocabulary, mesh = np.random.default_rng(0), twin.spec.vocab_size, twin.mesh
    tokens = rng.integers(0, vocabulary, (3, 20))
    want = np.asarray(forward(twin.params, tokens))
    np.testing.assert_allclose(forward(int8.params, tokens), want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 0.5  # the tolerance means something

    corpus = corpus_from_lists([rng.integers(0, vocabulary, 12) for _ in range(6)], [7] * 6)
    batch = pack(corpus, np.arange(6), fit_shape(corpus, [np.arange(6)], 32))
    inputs, batch = Inputs(jax.device_put(corpus.tokens, replicated(mesh)), 0), place_batch(batch, mesh)
    theta = read_site(twin.params, (DOWN,), mesh, {})
    gradient = jax.jit(jax.grad(batch_loss))
    want = np.asarray(gradient(theta, twin.params, inputs, batch)[DOWN])
    got = np.asarray(gradient(theta, int8.params, inputs, batch)[DOWN])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_overrides_of_every_kind_stand_in_for_int8_tensors(folders):
    """Of embedding, head, a norm and a matrix, in float32 and rounded to the activations' bfloat16."""
    checkpoint, int8 = load(folders["untied"])
    tokens = np.arange(24).reshape(2, 12)
    names = ("model.embed_tokens.weight", "lm_head.weight", DOWN, "model.layers.0.input_layernorm.weight")
    overrides = {n: hf_folder.read_tensor(checkpoint, n) + np.float32(0.1) for n in names}
    frozen, twin = (Params(checkpoint.spec, w) for w in (int8, dequantized(int8)))
    want = np.asarray(forward(twin.over(overrides), tokens))
    np.testing.assert_allclose(forward(frozen.over(overrides), tokens), want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - np.asarray(forward(frozen, tokens))).max() > 0.1

    half = hf_load.load_weights(checkpoint, mesh_of(ONE), jnp.bfloat16, int8=True)
    params = Params(checkpoint.spec, half, overrides)
    x = decoder.embed(params, tokens)
    assert x.dtype == params.dtype == half["norm"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, overrides[names[0]].astype(ml_dtypes.bfloat16)[tokens])
    # bfloat16 keeps 8 bits; 5 % of the logits' own scale is the distance stated for float weights too.
    gap = np.asarray(forward(params, tokens)) - want
    assert 0 < np.sqrt(np.mean(gap**2)) < 0.05 * np.std(want)


def test_decoding_and_preserved_inputs(model):
    rng, vocabulary = np.random.default_rng(3), model[0].spec.vocab_size
    prompts = [rng.integers(0, vocabulary, n).tolist() for n in (3, 9, 5, 14)]
    stop = np.arange(vocabulary) < 20
    said = [answer(m, Prompts(prompts, [[]] * 4, 12, stop), 32)[0] for m in model]
    assert said[0] == said[1] and max(map(len, said[0])) > 3
    got, want = (second_moments(m, (DOWN,), prompts, 32)[DOWN] for m in model)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


def test_the_flax_module(folders):
    model = hf_load.load_model(str(folders["untied"]), "int8", ONE)
    tokens = np.arange(24).reshape(2, 12)
    got = nnx.jit(lambda module, tokens: module(tokens))(CausalLM(model), tokens)
    np.testing.assert_allclose(got, forward(model.params, tokens), rtol=1e-5, atol=1e-5)

"""Where things lie in the compiled programs of a mesh: what is split stays split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from locft_jax.data.packing import corpus_from_lists, fit_shape, pack
from locft_jax.editing.site import read_site
from locft_jax.editing.step import Hyper, Regularizers, init_state, train_step
from locft_jax.evaluation.verify import score_batch
from locft_jax.model import decoder
from locft_jax.model.activation_cache import Inputs
from locft_jax.model.decode import abstract_slots, decode, read_batch
from locft_jax.model.sharding import cache_sharding, make_mesh, place_batch, replicated, weight_shardings
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params, abstract_weights

VOCABULARY, LAYERS = 520, 5  # no other size is either number
SITE = "model.layers.1.mlp.down_proj.weight"


def programs(tie, mesh, int8=False):
    """Every program that computes logits, lowered for the mesh."""
    spec = parse_spec(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": tie,
        }
    )
    shapes, places = abstract_weights(spec, jnp.float32, int8), weight_shardings(mesh, spec, int8)
    zeros = lambda a, place: jnp.zeros(a.shape, a.dtype, device=place)  # noqa: E731
    params = Params(spec, jax.tree.map(zeros, shapes, places))
    rng = np.random.default_rng(0)
    corpus = corpus_from_lists([rng.integers(0, VOCABULARY, 9) for _ in range(16)], [4] * 16)
    batch = pack(corpus, np.arange(16), fit_shape(corpus, [np.arange(16)], 32, 2))
    batch, ids = place_batch(batch, mesh), jax.device_put(corpus.tokens, replicated(mesh))
    inputs, stop = Inputs(ids, 0), jnp.zeros(VOCABULARY, bool, device=replicated(mesh))
    state = init_state(read_site(params, (SITE,), mesh, {SITE: np.zeros((32, 64), np.float32)}))
    slots = abstract_slots(params, mesh, 16, 32, 8)
    return {
        "train": train_step.lower(Hyper(1e-3, 0.0, 0.0), state, params, inputs, batch, Regularizers()),
        "score": score_batch.lower(params, inputs, batch),
        "read": read_batch.lower(1, params, ids, batch),
        "decode": decode.lower(params, slots, stop, jnp.int32(0)),
        "sample": decode.lower(params, slots, stop, jnp.int32(0), jax.random.key(0)),
    }


def whole(text):
    """Arrays in a compiled program that hold all of the vocabulary (but the set of stop tokens)."""
    sizes = re.findall(r"\b(\w+)\[([\d,]+)\]", text)
    return {
        f"{kind}[{size}]" for kind, size in sizes if kind != "pred" and str(VOCABULARY) in size.split(",")
    }


def gathered_stacks(text):
    """Results of all-gathers in a compiled program that hold a weight of every layer, [L, out, in]. (Keys
    and values of every layer have five dimensions: 8 devices cannot split their 4 heads.)"""
    sizes = [s.split(",") for s in re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather", text)]
    return [size for size in sizes if str(LAYERS) in size and len(size) <= 3]


@pytest.mark.parametrize(
    ("tie", "shape", "int8"), [(True, (1, 8), False), (False, (2, 4), False), (False, (1, 8), True)]
)
def test_logits_stay_split_over_the_vocabulary_and_stacks_over_devices(tie, shape, int8):
    mesh = make_mesh({"data": shape[0], "model": shape[1]})
    for name, lowered in programs(tie, mesh, int8).items():
        text = lowered.compile().as_text()
        assert not gathered_stacks(text), name
        assert f"{VOCABULARY // shape[1]}]" in text or f",{VOCABULARY // shape[1]}," in text, name
        assert not whole(text), name


def test_on_one_device_they_would_be_whole():
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    lowered = programs(True, mesh)
    assert all(whole(lowered[name].compile().as_text()) for name in ("score", "decode", "sample"))


def test_a_gathered_stack_would_be_found():
    mesh = make_mesh({"data": 1, "model": 8})
    stack = jax.ShapeDtypeStruct(
        (LAYERS, 64, 32), jnp.float32, sharding=NamedSharding(mesh, jax.P(None, "model"))
    )
    whole = jax.jit(lambda a: a + 1, out_shardings=replicated(mesh)).lower(stack).compile()
    assert gathered_stacks(whole.as_text())


def test_a_cache_splits_rows_and_heads_where_they_divide():
    mesh = make_mesh({"data": 2, "model": 4})
    spec = lambda *sizes: cache_sharding(mesh, *sizes).spec  # noqa: E731
    assert spec(16, 8) == jax.P(None, "data", "model")
    assert spec(12, 2) == jax.P(None, "data") and spec(5, 8) == jax.P(None, None, "model")
    assert spec(5, 2) == jax.P() and spec(16, 8, 0) == jax.P("data")
    assert spec(16, 2) == jax.P(None, ("data", "model"))  # fewer heads than devices


@pytest.mark.parametrize("size", [1, 7, 64, 97, 320, 1000])
def test_best_token_is_the_first_arg_max(size):
    scores = np.random.default_rng(size).integers(0, 4, (3, 5, size)).astype(np.float32)  # many ties
    best = jax.jit(decoder.best_token)(scores)
    assert best.dtype == jnp.int32
    np.testing.assert_array_equal(best, scores.argmax(-1))

"""KL(base || edited) on retained texts, as a term of the loss: what the base model expects there is computed
once, before the edit, and kept in few numbers.

Of every target the TOP likeliest tokens with their log-probabilities, and the log of what all others have
together. The texts are dealt into fixed mini-batches; the edits' mini-batch number v comes with number
v mod (how many there are), so that a run that goes on meets what it would have met.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locft_jax.config import Config
from locft_jax.data.packing import Batch, corpus_from_lists, fit_shape, pack
from locft_jax.editing.regularizers.texts import window
from locft_jax.editing.step import Kept, target_logits
from locft_jax.editing.trainer import place_batch
from locft_jax.io.hf_load import originals
from locft_jax.model.activation_cache import Source, cached_source, choose_mode
from locft_jax.model.model import Model
from locft_jax.model.sharding import fetch, place, replicated, source_sharding, width_split
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights, activation_dtype

TOP = 32  # tokens of a target that are kept one by one
TEXTS = 64  # of a mini-batch
MOST = 8192  # texts that are kept; of more, a seeded choice


@functools.partial(jax.jit, static_argnums=(0, 1))
def expected(
    spec: ModelSpec, start: int, weights: Weights, base: Overrides, source: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the model says at a batch's targets: (ids [M, K], logp [M, K], rest [M]) as in `Kept`; `source`
    enters layer `start`."""
    scores = target_logits(spec, start, weights, base, source, batch)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(scores, min(TOP, spec.vocab_size - 1))
    others = scores.at[jnp.arange(len(scores))[:, None], ids].set(-jnp.inf)
    return ids, best - total, jax.nn.logsumexp(others, axis=-1) - total[:, 0]


def make_keep(
    model: Model,
    site: Sequence[str],
    edits: Source,
    config: Config,
    ids: Sequence[Sequence[int]],
    budgets: tuple[float, float],
) -> Callable[[int], Kept | None]:
    """Number of the edits' mini-batch -> the retained one beside it, on the mesh (None when off). `edits`:
    the edits' own source, whose layer is used; `ids`: the retained texts, of which the first `row_length`
    tokens count (with preserve_tokens=last the last ones); `budgets`: bytes (a device, host) for their
    activations, as in `choose_mode`. What follows a text's last token is a target too (with last: alone)."""
    if not config.preserve_kl:
        return lambda visit: None
    rng = np.random.default_rng([config.seed, len(ids)])
    parts = [ids[i][window(config, config.row_length)] for i in rng.permutation(len(ids))[:MOST]]
    # A batch does not read a text's last token, so each gets one more.
    starts = [len(part) if config.preserve_tokens == "last" else 1 for part in parts]
    corpus = corpus_from_lists([[*part, part[-1]] for part in parts], starts)
    mesh, weights = model.mesh, model.weights
    base = model.with_overrides(originals(model, site)).overrides  # what the edit begins from, int8 or not
    # Beside the edits' own activations, which the budgets hold too.
    tokens = len(corpus.tokens) + (len(edits.values) if edits.mode != "off" else 0)
    size = tokens * model.spec.d_model * activation_dtype(weights).itemsize
    mode = choose_mode("auto", edits.layer, size, *budgets, width_split(mesh, model.spec.d_model))
    source = cached_source(model.spec, weights, corpus, edits.layer, mode, mesh, config.row_length, base=base)
    which = np.array_split(np.arange(len(corpus)), math.ceil(len(corpus) / TEXTS))
    shape = fit_shape(corpus, which, config.row_length, mesh.shape["data"])
    everywhere = replicated(mesh)
    strength = place(np.float32(config.preserve_kl), everywhere)

    def read(own: np.ndarray) -> tuple[Any, Batch]:
        batch = pack(corpus, own, shape, "token")
        assert batch is not None, "fit_shape saw every batch"
        array, batch = source.feed(batch)
        return place(array, source_sharding(mesh, array.shape)), place_batch(batch, mesh)

    known = [
        jax.tree.map(fetch, expected(model.spec, source.layer, weights, dict(base), *read(own)))
        for own in which
    ]

    def keep(visit: int) -> Kept:
        at = visit % len(which)
        array, batch = read(which[at])
        tokens, logp, rest = (place(a, everywhere) for a in known[at])
        return Kept(array, batch, tokens, logp, rest, strength)

    return keep

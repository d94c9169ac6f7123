"""KL(base || edited) on retained texts, as a term of the loss: what the base model expects there is computed
once, before the edit, and stored: of every target the TOP likeliest tokens with their log-probabilities, and
the log of what all others have together."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.config import Config
from locft_jax.data.packing import Batch, corpus_from_lists, fit_shape, pack
from locft_jax.editing.regularizers.second_moments import Ids
from locft_jax.editing.regularizers.texts import window
from locft_jax.editing.step import RetainBatch, target_logits
from locft_jax.model.activation_cache import Inputs, Source, cached_source, mode_for
from locft_jax.model.sharding import fetch, place, replicated
from locft_jax.model.weights import Params

TOP = 32  # tokens of a target that are stored one by one
TEXTS = 64  # of a mini-batch
MOST = 8192  # texts that are retained; of more, a seeded choice


@jax.jit
def expected(params: Params, inputs: Inputs, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the model says at a batch's targets: (ids [M, K], logp [M, K], rest [M]) as in `RetainBatch`."""
    scores = target_logits(params, inputs, batch)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(scores, min(TOP, params.spec.vocab_size - 1))
    others = scores.at[jnp.arange(len(scores))[:, None], ids].set(-jnp.inf)
    return ids, best - total, jax.nn.logsumexp(others, axis=-1) - total[:, 0]


def retain_batches(
    base: Params, mesh: Mesh, edits: Source, config: Config, ids: Ids, budgets: tuple[float, float]
) -> Callable[[int], RetainBatch | None]:
    """Number of the edits' mini-batch -> the retain batch beside it, on the mesh (None when off): in turn, so
    that a run that resumes meets what it would have met. `base`: what the edit begins from; `edits`: the
    edits' own source, whose layer is used; `ids`: the retained texts, of which the first `row_length` tokens
    count (with preserve_tokens=last the last ones), and what follows a text's last token is a target too
    (with last: alone); `budgets`: bytes (a device, host) for their activations, as in `choose_mode`."""
    if not config.preserve_kl:
        return lambda visit: None
    rng = np.random.default_rng([config.seed, len(ids)])
    parts = [ids[i][window(config, config.row_length)] for i in rng.permutation(len(ids))[:MOST]]
    # A batch does not read a text's last token, so each gets one more.
    starts = [len(part) if config.preserve_tokens == "last" else 1 for part in parts]
    corpus = corpus_from_lists([[*part, part[-1]] for part in parts], starts)
    # Beside the edits' own activations, which the budgets hold too.
    tokens = len(corpus.tokens) + (len(edits.values) if edits.mode != "off" else 0)
    mode = mode_for(base, mesh, "auto", edits.layer, tokens, budgets)
    source = cached_source(base, corpus, edits.layer, mode, mesh, config.row_length)
    which = np.array_split(np.arange(len(corpus)), math.ceil(len(corpus) / TEXTS))
    shape = fit_shape(corpus, which, config.row_length, mesh.shape["data"])
    everywhere = replicated(mesh)
    strength = place(np.float32(config.preserve_kl), everywhere)

    def read(own: np.ndarray) -> tuple[Inputs, Batch]:
        batch = pack(corpus, own, shape, "token")
        assert batch is not None, "fit_shape saw every batch"
        return source.feed(batch, mesh)

    known = [jax.tree.map(fetch, expected(base, *read(own))) for own in which]

    def retain(visit: int) -> RetainBatch:
        at = visit % len(which)
        ids, logp, rest = (place(a, everywhere) for a in known[at])
        return RetainBatch(*read(which[at]), ids, logp, rest, strength)

    return retain

"""Second moments at a matrix over retained texts: of its inputs, C = E[x x^T], and of the gradients at its
outputs, G = E[g g^T], where g is that of the log-likelihood of labels that the model itself draws. Of widths
beyond EXACT the leading eigenvectors, by randomized subspace iteration (Halko, Martinsson, Tropp 2011) in
PASSES passes over the texts: a [width, width] matrix is never made."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data import packing
from locft_jax.data.packing import Batch, Rows
from locft_jax.model import decoder
from locft_jax.model.model import Model
from locft_jax.model.sharding import fetch, place, place_batch, replicated
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Params, Weights, locate_tensor, weight_table

ROWS, LABEL_ROWS = 64, 16  # of a batch of the pass that sums C up, and of the one for G (with all logits)
INPUTS = {"q": "attn", "k": "attn", "v": "attn", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}

RULE = 2  # which tokens count, and how: what was computed by another rule is not used again
EXACT = 16384  # the widest inputs, or outputs, whose moment is computed whole
RANK, PASSES = 1024, 3  # eigenvectors of the others, and the passes that find them


@dataclasses.dataclass(frozen=True)
class Leading:
    """What is known of a moment [n, n] that is too wide to be computed."""

    vectors: np.ndarray  # [n, k] float32, orthonormal: the leading eigenvectors
    values: np.ndarray  # [k] float64, their eigenvalues, the largest first
    trace: float  # of all n


Moment = jax.Array | Leading
Moments = dict[str, Moment]  # HF tensor name -> C [in, in] or G [out, out], float32
Place = tuple[int, str]  # layer, and a key (outputs) or a value (inputs) of INPUTS
Ids = Sequence[Sequence[int]]  # token ids of texts
Sums = dict[Place, Any]
Bases = Mapping[Place, jax.Array]  # [width, k], of wide places


def _walk(
    params: Params, tokens: jax.Array, rows: Rows, layers: Sequence[int], nudges: Mapping[Place, jax.Array]
) -> tuple[jax.Array, dict[Place, jax.Array]]:
    """Token ids [B, T] of packed rows -> what leaves the last of `layers` [B, T, D], and what enters the
    matrices of all of them: {(layer, value of INPUTS): [B, T, in]}. `nudges`: {(layer, key of INPUTS):
    [B, T, out]}, added to what leaves a matrix."""
    found: dict[Place, jax.Array] = {}

    def tap(layer: int, key: str, x: jax.Array, w: Weights) -> jax.Array:
        found[layer, INPUTS[key]] = x
        y = decoder.project(key, x, w)
        return y + nudges[layer, key] if (layer, key) in nudges else y

    def body(w: Weights, layer: Any, x: jax.Array) -> jax.Array:
        how = decoder.packed(rows, decoder.windows(params.spec)[layer])
        return decoder.layer(params.spec, w, x, how, functools.partial(tap, layer))[0]

    x, at = decoder.embed(params, tokens), 0
    for layer in layers:
        x = decoder.run_layers(params, x, rows, at, layer) if layer > at else x
        x, at = decoder.fold_layers(params, body, x, layer, layer + 1), layer + 1
    return x, found


def _counts(batch: Batch, last: bool) -> jax.Array:
    """Which tokens count [B, T] bool: only a text's `last`, or all but its first, whose inputs are nearly the
    same whatever it is, and may be so large (an attention sink) that they alone would make up the trace."""
    segments = batch.rows.segments
    used = (segments > 0) & (batch.rows.positions > 0)
    return used & (segments != jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))) if last else used


def _squares(x: jax.Array, used: jax.Array, basis: jax.Array | None) -> jax.Array | dict[str, jax.Array]:
    """Sum of x x^T over the used [B, T] vectors of x [B, T, D]: [D, D] float32; with a `basis` [D, k] its
    product with it, and its trace."""
    z = jnp.where(used[..., None], x, 0).astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if basis is None:
        return product("btd,bte->de", z, z)
    return {"product": product("btd,btk->dk", z, product("btd,dk->btk", z, basis)), "trace": jnp.sum(z * z)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _input_sums(
    wanted: tuple[Place, ...], last: bool, params: Params, bases: Bases, tokens: jax.Array, batch: Batch
) -> Sums:
    """Sums of x x^T over a batch's tokens as in `_squares`, for the wanted (layer, value of INPUTS)."""
    _, found = _walk(params, tokens[batch.index], batch.rows, sorted({l for l, _ in wanted}), {})
    return {at: _squares(found[at], _counts(batch, last), bases.get(at)) for at in wanted}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _output_sums(
    wanted: tuple[Place, ...],
    last: bool,
    key: jax.Array,
    params: Params,
    bases: Bases,
    tokens: jax.Array,
    batch: Batch,
) -> Sums:
    """Sums of g g^T over a batch's tokens as in `_squares`, for the wanted (layer, key of INPUTS). A token's
    label is drawn from what the model expects after it, by its place in the corpus."""
    spec, used = params.spec, _counts(batch, last)
    layers = sorted({l for l, _ in wanted})

    def likelihood(nudges: dict[Place, jax.Array]) -> jax.Array:
        x, _ = _walk(params, tokens[batch.index], batch.rows, layers, nudges)
        if layers[-1] + 1 < spec.n_layers:
            x = decoder.run_layers(params, x, batch.rows, layers[-1] + 1, spec.n_layers)
        scores = jax.nn.log_softmax(decoder.head(params, x)).reshape(-1, spec.vocab_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index.reshape(-1))
        labels = jax.vmap(jax.random.categorical)(keys, jax.lax.stop_gradient(scores))
        own = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(used.reshape(-1), own, 0))

    table = weight_table(spec)
    nothing = {(l, m): jnp.zeros((*batch.index.shape, table[m].shape[0]), params.dtype) for l, m in wanted}
    return {at: _squares(g, used, bases.get(at)) for at, g in jax.grad(likelihood)(nothing).items()}


@dataclasses.dataclass(frozen=True)
class _Texts:
    """What a pass reads."""

    ids: Ids
    row_length: int
    rows: int  # of a batch, at most
    last: bool  # only a text's last token counts


def _means(sums: Callable[[jax.Array, Batch], Sums], mesh: Mesh, texts: _Texts) -> Sums:
    """`sums` (of the corpus's tokens, and a batch of it) in one pass over all texts, per counted token."""
    # A batch does not read a text's last token, so each gets one more.
    longer, starts = [[*ids, ids[-1]] for ids in texts.ids], [len(ids) for ids in texts.ids]
    corpus, data = packing.corpus_from_lists(longer, starts), mesh.shape["data"]
    length, rows = packing.even_rows(corpus, texts.row_length, texts.rows, data)
    batches = list(packing.sequential_batches(corpus, rows, length))
    shape = packing.fit_shape(corpus, batches, length, data)
    tokens, total = place(corpus.tokens, replicated(mesh)), Sums()
    for which in batches:
        batch = packing.pack(corpus, which, shape)
        assert batch is not None, "fit_shape saw every batch"
        own = sums(tokens, place_batch(batch, mesh))
        total = jax.tree.map(jnp.add, total, own) if total else own
        # One batch at a time: CPU devices queue 32 programs at most, then can wait for each other for ever.
        jax.block_until_ready(total)
    count = len(texts.ids) if texts.last else max(1, sum(starts) - len(texts.ids))
    return jax.tree.map(lambda value: value / count, total)


def _moments(
    sums: Callable[..., Sums], model: Model, places: Mapping[str, Place], axis: int, texts: _Texts
) -> Moments:
    """The moments at the places of tensors, at inputs (axis 1) or outputs (0); `sums` takes places, bases,
    tokens and a batch."""
    widths = {at: locate_tensor(model.spec, name)[0].shape[axis] for name, at in places.items()}
    exact = tuple(sorted(at for at, width in widths.items() if width <= EXACT))
    wide = tuple(sorted(widths.keys() - set(exact)))
    found = _means(functools.partial(sums, exact, {}), model.mesh, texts) if exact else {}
    rng, orthonormal = np.random.default_rng(0), lambda a: np.linalg.qr(a)[0].astype(np.float32)
    bases = {at: orthonormal(rng.standard_normal((widths[at], min(RANK, widths[at])))) for at in wide}
    for at_pass in range(PASSES if wide else 0):
        placed = {at: place(basis, replicated(model.mesh)) for at, basis in bases.items()}
        for at, own in _means(functools.partial(sums, wide, placed), model.mesh, texts).items():
            product = fetch(own["product"]).astype(np.float64)
            if at_pass < PASSES - 1:
                bases[at] = orthonormal(product)
                continue
            small = bases[at].T.astype(np.float64) @ product  # the moment within the basis
            values, vectors = np.linalg.eigh((small + small.T) / 2)
            leading = (bases[at] @ vectors[:, ::-1]).astype(np.float32)
            found[at] = Leading(leading, np.maximum(values[::-1], 0), float(fetch(own["trace"])))
    return {name: found[at] for name, at in places.items()}


def matrices_of(spec: ModelSpec, site: Sequence[str]) -> dict[str, Place]:
    """The site's matrices in layers: HF name -> (layer, key of INPUTS)."""
    located = {name: locate_tensor(spec, name) for name in site}
    return {n: (l, row.key) for n, (row, l) in located.items() if row.key in INPUTS and l is not None}


def second_moments(
    model: Model, site: Sequence[str], ids: Ids, row_length: int, last: bool = False
) -> Moments:
    """C = E[x x^T] [in, in], float32, over the tokens of texts (token ids), or over the `last` token of each,
    for every matrix of the site in a layer, `Leading` where it is wide; matrices with one input share one."""
    places = {n: (l, INPUTS[m]) for n, (l, m) in matrices_of(model.spec, site).items()}
    sums = lambda wanted, *rest: _input_sums(wanted, last, model.params, *rest)  # noqa: E731
    return _moments(sums, model, places, 1, _Texts(ids, row_length, ROWS, last))


def gradient_moments(
    model: Model, site: Sequence[str], ids: Ids, row_length: int, seed: int, last: bool = False
) -> Moments:
    """G = E[g g^T] [out, out], float32, of the gradients at the same tokens; `seed`: of the drawn labels."""
    places, draw = matrices_of(model.spec, site), jax.random.key(seed)
    sums = lambda wanted, *rest: _output_sums(wanted, last, draw, model.params, *rest)  # noqa: E731
    return _moments(sums, model, places, 0, _Texts(ids, row_length, LABEL_ROWS, last))

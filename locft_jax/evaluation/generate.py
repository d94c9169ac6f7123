"""Greedy decoding with a KV cache: what runs on the device.

A packed pass reads texts and keeps their keys and values; rows of a decoding batch take theirs from
it, token by token go on, and leave when they are done. Shapes are few (`few_sizes`).

Letters as in decoder.py; R rows of a decoding batch, C cache slots, P of them for the texts so far.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.tokens import Batch, few_sizes
from locft_jax.model import decoder
from locft_jax.model.sharding import replicated, rows_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Edits, Weights

BATCH = 256  # rows of a full batch
LEAST = 16  # rows of the smallest: a smaller one is no faster, its time is that of reading the weights
FEW = 32  # rows that rather wait for others than go on by themselves


@dataclasses.dataclass(frozen=True)
class Reader:
    """The model that is asked, with its edits, and how long the packed rows of its passes are."""

    spec: ModelSpec
    weights: Weights
    edits: Edits
    mesh: Mesh
    row_length: int = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """A batch of R texts that are being continued. Texts end at slot P, so that every row's next
    token goes to the same slot."""

    keys: Any  # [L, R, K, H, C]: as the products of one query a row read them, without a copy
    values: Any  # [L, R, K, C, H]
    pads: Any  # [R] int32: slots before the text begins
    left: Any  # [R] int32: how many more tokens are allowed, 0: done
    token: Any  # [R] int32: the text's last token, not yet in the cache
    slot: Any  # int32: where it goes
    said: Any  # [R, C - P] int32: what was decoded, -1 where nothing was


def fewer(rows: int) -> int:
    """How many rows a batch of `rows` shrinks to when so few are left."""
    return max(LEAST, few_sizes(-(-rows // 2)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_batch(
    spec: ModelSpec, layer: int, weights: Weights, edits: Edits, tokens: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """One pass over packed texts, `batch` into the flat ids `tokens`: (arg-max at each target [M],
    what enters `layer` [B, T, D], keys and values [L, B, T, K, H] each)."""
    batch_size, time = batch.index.shape
    shape = (spec.n_layers, batch_size, time, spec.n_kv_heads, spec.head_dim)
    empty = jnp.zeros(shape, weights["embed"].dtype)
    windows, last = decoder.windows(spec), spec.n_layers - 1

    def keep(layer: Any, carry: tuple, x: jax.Array, new: decoder.KeysValues) -> tuple:
        put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, layer, 0)  # noqa: E731
        return x, *(put(a, b) for a, b in zip(carry[1:], new, strict=True))

    def body(w: dict[str, jax.Array], l: Any, carry: tuple) -> tuple:
        return keep(l, carry, *decoder.block(spec, w, carry[0], batch.rows, windows[l]))

    def end(w: dict[str, jax.Array], l: Any, carry: tuple) -> tuple:
        return keep(l, carry, *decoder.last_block(spec, w, carry[0], batch.rows, windows[l], batch.targets))

    carry = (decoder.embed(spec, weights, edits, tokens[batch.index]), empty, empty)
    carry = decoder.fold_layers(spec, weights, edits, body, carry, 0, layer)
    entering = carry[0]
    carry = decoder.fold_layers(spec, weights, edits, body, carry, layer, last)
    x, *cache = decoder.fold_layers(spec, weights, edits, end, carry, last, last + 1)
    best = decoder.best_token(decoder.head(spec, weights, edits, x))
    return best, entering, (cache[0], cache[1])


@functools.partial(jax.jit, static_argnums=0)
def admit(
    new_tokens: int,
    cache: decoder.KeysValues,
    index: jax.Array,
    pads: jax.Array,
    left: jax.Array,
    token: jax.Array,
) -> Decoding:
    """Rows out of a pass: `index` [R, P] places in its B * T (any at padding); room for `new_tokens`."""
    layers, _, _, heads, width = cache[0].shape
    keys, values = (a.reshape(layers, -1, heads, width)[:, index] for a in cache)  # [L, R, P, K, H]
    room = ((0, 0), (0, 0), (0, 0), (0, new_tokens), (0, 0))
    values = jnp.pad(jnp.swapaxes(values, 2, 3), room)
    keys = jnp.swapaxes(jnp.pad(jnp.swapaxes(keys, 2, 3), room), 3, 4)
    said = jnp.full((index.shape[0], new_tokens), -1, jnp.int32)
    return Decoding(keys, values, pads, left, token, jnp.int32(index.shape[1]), said)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(spec: ModelSpec, weights: Weights, edits: Edits, state: Decoding, stop: jax.Array) -> Decoding:
    """Greedy tokens until no more than `fewer(R)` rows are left (a smaller batch can go on with
    those), or all are done: a row ends with a token of the stop set (`stop` [V] bool)."""
    windows, rows = decoder.windows(spec), state.left.shape[0]
    enough = fewer(rows) if rows > LEAST else 0
    slots = state.values.shape[3]
    first = slots - state.said.shape[1]

    def more(s: Decoding) -> jax.Array:
        return jnp.sum(s.left > 0) > enough

    def step(s: Decoding) -> Decoding:
        positions = s.slot - s.pads  # [R]; of an unused row: anything
        distance = s.slot - jnp.arange(slots)  # [C]
        seen = (distance >= 0) & (jnp.arange(slots) >= s.pads[:, None])  # [R, C]

        def body(w: dict[str, jax.Array], l: Any, carry: tuple) -> tuple:
            x, keys, values = carry
            h = decoder.rms_norm(x, w["attn_norm"], spec.rms_eps)
            k, v = decoder.keys_values(spec, w, h, positions)
            keys = jax.lax.dynamic_update_slice(keys, k[None, ..., None], (l, 0, 0, 0, s.slot))
            values = jax.lax.dynamic_update_slice(values, v[None, :, :, None], (l, 0, 0, s.slot, 0))
            here = lambda a: jax.lax.dynamic_index_in_dim(a, l, keepdims=False)  # noqa: E731
            q = decoder.queries(spec, w, h, positions)
            mask = seen & (distance < windows[l])
            x = x + decoder.linear(attend(q, here(keys), here(values), mask), w["o"])
            return decoder.mlp(spec, w, x), keys, values

        x = decoder.embed(spec, weights, edits, s.token)  # [R, D]
        carry = (x, s.keys, s.values)
        x, keys, values = decoder.fold_layers(spec, weights, edits, body, carry, 0, spec.n_layers)
        token = decoder.best_token(decoder.head(spec, weights, edits, x))
        new = jnp.where(s.left > 0, token, -1)[:, None]
        return dataclasses.replace(
            s,
            keys=keys,
            values=values,
            left=jnp.where(stop[token], 0, jnp.maximum(s.left - 1, 0)),
            token=token,
            slot=s.slot + 1,
            said=jax.lax.dynamic_update_slice(s.said, new, (0, s.slot - first)),
        )

    return jax.lax.while_loop(more, step, state)


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """One query a row: q [R, N, H], keys [R, K, H, C], values [R, K, C, H], mask [R, C] -> [R, N * H]."""
    rows, heads, width = q.shape
    q = q.reshape(rows, keys.shape[1], -1, width)
    scores = jnp.einsum("rkgh,rkhc->rkgc", q, keys, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("rkgc,rkch->rkgh", jax.nn.softmax(scores).astype(values.dtype), values)
    return out.reshape(rows, heads * width)


@jax.jit
def keep_rows(state: Decoding, rows: jax.Array) -> Decoding:
    """The batch of the rows `rows` [r] alone."""
    kept = {name: getattr(state, name)[rows] for name in ("pads", "left", "token", "said")}
    return Decoding(keys=state.keys[:, rows], values=state.values[:, rows], slot=state.slot, **kept)


def continue_texts(
    reader: Reader,
    cache: decoder.KeysValues,
    places: Sequence[np.ndarray],
    tokens: Sequence[int],
    room: Sequence[int],
    most: int,
    stop: np.ndarray,
    all_of_them: bool,
) -> list[list[int]]:
    """Greedy tokens behind texts that a pass has read. A text is `places` of its tokens but the last
    among the cache's B * T, and the last in `tokens`; `room`: how many more are allowed (at most
    `most`). Without `all_of_them` the last FEW of a batch may be left unfinished."""
    stop_set = jax.device_put(stop, replicated(reader.mesh))
    said: list[list[int]] = []
    parts = -(-len(places) // BATCH)
    for which in np.array_split(np.arange(len(places)), parts) if parts else ():
        rows = few_sizes(len(which), LEAST, 4)
        longest = max(len(places[i]) for i in which)
        slots = few_sizes(longest, 8)
        index = np.zeros((rows, slots), np.int32)
        pads, left, token = np.full(rows, slots, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row, i in enumerate(which):
            pads[row], left[row], token[row] = slots - len(places[i]), room[i], tokens[i]
            index[row, pads[row] :] = places[i]
        place = functools.partial(jax.device_put, device=rows_sharding(reader.mesh, rows))
        state = admit(most, cache, place(index), place(pads), place(left), place(token))
        out: list[list[int]] = [[] for _ in which]
        alive = np.arange(len(which))  # of each row of the state: which text it is
        while True:
            state = decode(reader.spec, reader.weights, reader.edits, state, stop_set)
            for row, text in zip(np.asarray(state.said), alive, strict=False):
                out[text] = row[row >= 0].tolist()
            going = np.flatnonzero(np.asarray(state.left) > 0)
            alive = alive[going]
            if not len(alive) or (len(alive) <= FEW and not all_of_them):
                break
            rows = fewer(rows)
            idle = np.flatnonzero(np.asarray(state.left) == 0)[:1]  # stands in for rows that nobody needs
            chosen = np.concatenate([going, np.repeat(idle, rows - len(going))]).astype(np.int32)
            state = keep_rows(state, jax.device_put(chosen, replicated(reader.mesh)))
        said += out
    return said

"""Greedy decoding with a KV cache, in a pool of rows.

A packed pass reads texts and keeps their keys and values. Each text that is to go on takes a row of the
pool, and gives it to another when it is done, so that few rows are there for nothing. Shapes are few.

Letters as in decoder.py; R rows of the pool, P slots of a row for what was read, N for what is new.
The new slots are a ring: in every step all rows write to the same one, and none needs more than N.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import Batch, few_sizes
from locft_jax.model import decoder
from locft_jax.model.sharding import cache_sharding, fetch, place, replicated, split_heads
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights, activation_dtype

MOST = 256  # rows of a full pool
LEAST = 16  # rows of the smallest: a smaller one is no faster, its time is that of reading the weights


@dataclasses.dataclass(frozen=True)
class Reader:
    """The model that is asked, with its edits, and how long the packed rows of its passes are."""

    spec: ModelSpec
    weights: Weights
    edits: Overrides
    mesh: Mesh
    row_length: int = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The pool on the device. A text ends at slot P of its row; its last token is not in the cache yet."""

    keys: Any  # [L, R, K, H, P + N]: as the product with one query a row reads them, without a copy
    values: Any  # [L, R, K, P + N, H]
    pads: Any  # [R] int32: slots before the text begins
    begun: Any  # [R] int32: the step at which it came
    left: Any  # [R] int32: how many more tokens are allowed; 0: done, the row is free
    made: Any  # [R] int32: how many were made
    token: Any  # [R] int32: the last one
    said: Any  # [R, N] int32: those that were made; step s is at s % N
    step: Any  # int32


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_batch(
    spec: ModelSpec, layer: int, weights: Weights, edits: Overrides, tokens: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """One pass over packed texts, `batch` into the flat ids `tokens`: (arg-max at each target [M],
    what enters `layer` [B, T, D], keys and values [L, B, T, K, H] each)."""
    batch_size, time = batch.index.shape
    shape = (spec.n_layers, batch_size, time, spec.n_kv_heads, spec.head_dim)
    empty = jnp.zeros(shape, activation_dtype(weights))
    windows, last = decoder.windows(spec), spec.n_layers - 1

    def keep(layer: Any, carry: tuple, x: jax.Array, new: decoder.KeysValues) -> tuple:
        put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, layer, 0)  # noqa: E731
        return x, *(put(a, b) for a, b in zip(carry[1:], new, strict=True))

    def body(w: Weights, l: Any, carry: tuple) -> tuple:
        return keep(l, carry, *decoder.block(spec, w, carry[0], batch.rows, windows[l]))

    def end(w: Weights, l: Any, carry: tuple) -> tuple:
        return keep(l, carry, *decoder.last_block(spec, w, carry[0], batch.rows, windows[l], batch.targets))

    carry = (decoder.embed(spec, weights, edits, tokens[batch.index]), empty, empty)
    carry = decoder.fold_layers(spec, weights, edits, body, carry, 0, layer)
    entering = carry[0]
    carry = decoder.fold_layers(spec, weights, edits, body, carry, layer, last)
    x, *cache = decoder.fold_layers(spec, weights, edits, end, carry, last, last + 1)
    best = decoder.best_token(decoder.head(spec, weights, edits, x))
    return best, entering, (cache[0], cache[1])


@functools.partial(jax.jit, donate_argnums=0)
def admit(
    pool: Rows,
    cache: decoder.KeysValues,
    rows: jax.Array,
    places: jax.Array,
    pads: jax.Array,
    left: jax.Array,
    token: jax.Array,
) -> Rows:
    """Texts out of a pass into `rows` [A] (R: nowhere): `places` [A, P] of their tokens among its B * T
    (any at padding)."""
    layers, _, _, heads, width = cache[0].shape
    keys, values = (a.reshape(layers, -1, heads, width)[:, places] for a in cache)  # [L, A, P, K, H]
    slots = places.shape[1]
    put = lambda a, b: a.at[rows].set(b, mode="drop")  # noqa: E731
    return dataclasses.replace(
        pool,
        keys=pool.keys.at[:, rows, :, :, :slots].set(keys.transpose(0, 1, 3, 4, 2), mode="drop"),
        values=pool.values.at[:, rows, :, :slots].set(values.swapaxes(2, 3), mode="drop"),
        pads=put(pool.pads, pads),
        begun=put(pool.begun, pool.step),
        left=put(pool.left, left),
        made=put(pool.made, 0),
        token=put(pool.token, token),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(
    spec: ModelSpec, weights: Weights, edits: Overrides, pool: Rows, stop: jax.Array, enough: jax.Array
) -> Rows:
    """Greedy tokens until at most `enough` rows are left: a row ends with a token of the stop set
    (`stop` [V] bool), or when no more are allowed."""
    windows, ring = decoder.windows(spec), pool.said.shape[1]
    read = pool.values.shape[3] - ring  # P

    def more(s: Rows) -> jax.Array:
        return jnp.sum(s.left > 0) > enough

    def step(s: Rows) -> Rows:
        age, here = (s.step - s.begun)[:, None], s.step % ring
        positions = read - s.pads + age[:, 0]  # [R]
        old, new = jnp.arange(read), (s.step - jnp.arange(ring)) % ring  # new: how many steps ago
        distance = jnp.concatenate([read - old + age, jnp.broadcast_to(new, s.said.shape)], axis=1)
        seen = jnp.concatenate([old >= s.pads[:, None], new <= age], axis=1)  # [R, P + N]

        def body(w: Weights, l: Any, carry: tuple) -> tuple:
            x, keys, values = carry
            h = decoder.rms_norm(x, w["attn_norm"], spec.rms_eps)
            k, v = decoder.keys_values(spec, w, h, positions)
            keys = jax.lax.dynamic_update_slice(keys, k[None, ..., None], (l, 0, 0, 0, read + here))
            values = jax.lax.dynamic_update_slice(values, v[None, :, :, None], (l, 0, 0, read + here, 0))
            own = lambda a: jax.lax.dynamic_index_in_dim(a, l, keepdims=False)  # noqa: E731
            q = decoder.queries(spec, w, h, positions)
            mask = seen & (distance < windows[l])
            x = x + decoder.linear(attend(q, own(keys), own(values), mask), w["o"])
            return decoder.mlp(spec, w, x), keys, values

        x = decoder.embed(spec, weights, edits, s.token)  # [R, D]
        carry = (x, s.keys, s.values)
        x, keys, values = decoder.fold_layers(spec, weights, edits, body, carry, 0, spec.n_layers)
        token = decoder.best_token(decoder.head(spec, weights, edits, x))
        live = s.left > 0
        said = jnp.where(live, token, jax.lax.dynamic_index_in_dim(s.said, here, 1, keepdims=False))
        return dataclasses.replace(
            s,
            keys=keys,
            values=values,
            left=jnp.where(stop[token], 0, jnp.maximum(s.left - 1, 0)),
            made=s.made + live,
            token=token,
            said=jax.lax.dynamic_update_slice(s.said, said[:, None], (0, here)),
            step=s.step + 1,
        )

    return jax.lax.while_loop(more, step, pool)


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """One query a row: q [R, N, H], keys [R, K, H, C], values [R, K, C, H], mask [R, C] -> [R, N * H]."""
    rows, heads, width = q.shape
    q = split_heads(q).reshape(rows, keys.shape[1], -1, width)
    scores = jnp.einsum("rkgh,rkhc->rkgc", q, keys, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("rkgc,rkch->rkgh", jax.nn.softmax(scores).astype(values.dtype), values)
    return split_heads(out.reshape(rows, heads, width)).reshape(rows, heads * width)


@jax.jit
def keep_rows(pool: Rows, rows: jax.Array) -> Rows:
    """The pool of `rows` [r] alone."""
    kept = {name: getattr(pool, name)[rows] for name in ("pads", "begun", "left", "made", "token", "said")}
    return Rows(keys=pool.keys[:, rows], values=pool.values[:, rows], step=pool.step, **kept)


def pool_like(spec: ModelSpec, mesh: Mesh, dtype: Any, rows: int, slots: int, new_tokens: int) -> Rows:
    """Shapes and shardings of a pool."""
    heads, width, length = spec.n_kv_heads, spec.head_dim, slots + new_tokens
    cache, row = (cache_sharding(mesh, rows, heads, axis) for axis in (1, 0))
    like = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    return Rows(
        keys=like((spec.n_layers, rows, heads, width, length), dtype, cache),
        values=like((spec.n_layers, rows, heads, length, width), dtype, cache),
        **{n: like((rows,), jnp.int32, row) for n in ("pads", "begun", "left", "made", "token")},
        said=like((rows, new_tokens), jnp.int32, row),
        step=like((), jnp.int32, replicated(mesh)),
    )


def _empty(reader: Reader, rows: int, slots: int, new_tokens: int) -> Rows:
    """A pool with nobody in it."""
    like = pool_like(reader.spec, reader.mesh, activation_dtype(reader.weights), rows, slots, new_tokens)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), like)


class Pool:
    """Texts that are being continued. `add` takes what a pass has read, `finish` waits for all; both
    yield (text, tokens) of those that got done."""

    def __init__(self, reader: Reader, rows: int, slots: int, new_tokens: int, stop: np.ndarray) -> None:
        self.reader, self.slots = reader, slots
        self.stop = place(stop, replicated(reader.mesh))
        self.text = np.full(few_sizes(rows, LEAST, 4), -1)  # of each row, -1: free
        self.pool = _empty(reader, len(self.text), slots, new_tokens)

    def add(
        self,
        cache: decoder.KeysValues,
        texts: Sequence[int],
        places: Sequence[np.ndarray],
        tokens: Sequence[int],
        room: Sequence[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Number of each text, `places` of its tokens but the last among the cache's B * T, the last, and
        how many more are allowed."""
        each = max(1, len(self.text) // 4)
        for start in range(0, len(texts), each):
            which = range(start, min(start + each, len(texts)))
            yield from self._run(len(self.text) - len(which))
            rows, free = np.full(each, len(self.text), np.int32), np.flatnonzero(self.text < 0)
            index, pads = np.zeros((each, self.slots), np.int32), np.full(each, self.slots, np.int32)
            left, last = np.zeros(each, np.int32), np.zeros(each, np.int32)
            for n, i in enumerate(which):
                rows[n], pads[n], left[n], last[n] = free[n], self.slots - len(places[i]), room[i], tokens[i]
                index[n, pads[n] :] = places[i]
                self.text[free[n]] = texts[i]
            self.pool = admit(self.pool, cache, *map(self._place, (rows, index, pads, left, last)))

    def finish(self) -> Iterator[tuple[int, list[int]]]:
        while (self.text >= 0).any():
            live = np.flatnonzero(self.text >= 0)
            size = few_sizes(len(live), LEAST, 1)
            if 2 * size <= len(self.text):
                idle = np.flatnonzero(self.text < 0)[: size - len(live)]
                rows = np.concatenate([live, idle]).astype(np.int32)
                self.text, self.pool = self.text[rows], keep_rows(self.pool, self._place(rows))
            # Until it can shrink to half or less, or, where it cannot, until all are done.
            quarter = len(self.text) // 4
            yield from self._run(quarter if 2 * few_sizes(quarter, LEAST, 1) <= len(self.text) else 0)

    def _place(self, a: np.ndarray | np.generic) -> jax.Array:
        return place(a, replicated(self.reader.mesh))

    def _run(self, enough: int) -> Iterator[tuple[int, list[int]]]:
        """Decode until at most `enough` rows are taken; free those that are done."""
        if (self.text >= 0).sum() <= enough:
            return
        r = self.reader
        self.pool = pool = decode(
            r.spec, r.weights, r.edits, self.pool, self.stop, self._place(np.int32(enough))
        )
        left, made, begun, said = map(fetch, (pool.left, pool.made, pool.begun, pool.said))
        for row in np.flatnonzero((self.text >= 0) & (left == 0)):
            steps = (begun[row] + np.arange(made[row])) % said.shape[1]
            yield int(self.text[row]), said[row, steps].tolist()
            self.text[row] = -1

"""Decoding on a KV cache with continuous batching: a packed pass reads texts and leaves their keys and
values; each text to be continued takes a decode slot until it is done. Letters as in decoder.py; R slots, P
cached positions of a slot for what was read, N for what is new: a ring, in a step all slots write to one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import Batch, few_sizes
from locft_jax.model import decoder
from locft_jax.model.sharding import cache_sharding, fetch, place, replicated, split_heads
from locft_jax.model.weights import Params, Weights

Carry = tuple[jax.Array, jax.Array, jax.Array]  # through the layers: the residual stream, keys, values

MOST = 256  # decode slots at a time
LEAST = 16  # fewer are no faster: their time is that of reading the weights
SAMPLE_SLOTS = 128  # sequences that are sampled at a time
ROWS = ("pads", "begun", "left", "made", "token")  # what `Slots` has of each slot, a number each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The decode slots on the device. A text ends at position P of its slot, its last token not cached."""

    keys: Any  # [L, R, K, H, P + N]: as the product with one query a slot reads them, without a copy
    values: Any  # [L, R, K, P + N, H]
    pads: Any  # [R] int32: positions before the text begins
    begun: Any  # [R] int32: the step at which it came
    left: Any  # [R] int32: how many more tokens are allowed; 0: the slot is free
    made: Any  # [R] int32: how many were made
    token: Any  # [R] int32: the last one
    said: Any  # [R, N] int32: those that were made; step s is at s % N
    step: Any  # int32


@functools.partial(jax.jit, static_argnums=0)
def read_batch(
    layer: int, params: Params, tokens: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, decoder.KeysValues]:
    """One pass over packed texts, `batch` into the flat ids `tokens`: (arg-max at each target [M],
    what enters `layer` [B, T, D], keys and values [L, B, T, K, H] each)."""
    spec, rows = params.spec, batch.rows
    empty = jnp.zeros((spec.n_layers, *batch.index.shape, spec.n_kv_heads, spec.head_dim), params.dtype)
    window, last = decoder.windows(spec), spec.n_layers - 1

    def run(carry: Carry, start: int, stop: int, attend: Callable[..., decoder.Attend]) -> Carry:
        def body(w: Weights, l: Any, carry: Carry) -> Carry:
            x, (k, v) = decoder.layer(spec, w, carry[0], attend(rows, window[l]))
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=l, axis=0)
            return x, put(carry[1], k), put(carry[2], v)

        return decoder.fold_layers(params, body, carry, start, stop)

    carry = run((decoder.embed(params, tokens[batch.index]), empty, empty), 0, layer, decoder.packed)
    entering = carry[0]
    carry = run(carry, layer, last, decoder.packed)
    at_targets = functools.partial(decoder.packed_targets, targets=batch.targets)
    x, keys, values = run(carry, last, last + 1, at_targets)
    return decoder.best_token(decoder.head(params, x)), entering, (keys, values)


@functools.partial(jax.jit, donate_argnums=0)
def admit(
    state: Slots, cache: decoder.KeysValues, slots: jax.Array, places: jax.Array, new: dict[str, Any]
) -> Slots:
    """Texts out of a pass into `slots` [A] (R: nowhere): `places` [A, P] of their tokens among the pass's
    B * T (any at padding); `new`: their pads, left and token, [A] each."""
    layers, _, _, heads, width = cache[0].shape
    keys, values = (a.reshape(layers, -1, heads, width)[:, places] for a in cache)  # [L, A, P, K, H]
    length, new = places.shape[1], {**new, "begun": state.step, "made": 0}
    return dataclasses.replace(
        state,
        keys=state.keys.at[:, slots, :, :, :length].set(keys.transpose(0, 1, 3, 4, 2), mode="drop"),
        values=state.values.at[:, slots, :, :length].set(values.swapaxes(2, 3), mode="drop"),
        **{name: getattr(state, name).at[slots].set(row, mode="drop") for name, row in new.items()},
    )


@functools.partial(jax.jit, donate_argnums=1)
def decode(
    params: Params, state: Slots, stop: jax.Array, enough: jax.Array, key: jax.Array | None = None
) -> Slots:
    """Tokens until at most `enough` slots are taken: greedy ones, with a `key` samples at temperature 1. A
    slot is done with a token of the stop set (`stop` [V] bool), or when no more are allowed."""
    spec, ring = params.spec, state.said.shape[1]
    window, read = decoder.windows(spec), state.values.shape[3] - ring  # P

    def step(s: Slots) -> Slots:
        age, here = (s.step - s.begun)[:, None], s.step % ring
        positions = read - s.pads + age[:, 0]  # [R]
        old, new = jnp.arange(read), (s.step - jnp.arange(ring)) % ring  # new: how many steps ago
        distance = jnp.concatenate([read - old + age, jnp.broadcast_to(new, s.said.shape)], axis=1)
        seen = jnp.concatenate([old >= s.pads[:, None], new <= age], axis=1)  # [R, P + N]

        def body(w: Weights, l: Any, carry: Carry) -> Carry:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, decoder.KeysValues]:
                at = read + here
                keys = jax.lax.dynamic_update_slice(carry[1], k[None, ..., None], (l, 0, 0, 0, at))
                values = jax.lax.dynamic_update_slice(carry[2], v[None, :, :, None], (l, 0, 0, at, 0))
                own = [jax.lax.dynamic_index_in_dim(a, l, keepdims=False) for a in (keys, values)]
                return attend_one(q, own[0], own[1], seen & (distance < window[l])), (keys, values)

            x, (keys, values) = decoder.layer(spec, w, carry[0], decoder.Attend(attend, positions, positions))
            return x, keys, values

        carry = (decoder.embed(params, s.token), s.keys, s.values)  # [R, D]
        x, keys, values = decoder.fold_layers(params, body, carry, 0, spec.n_layers)
        scores = decoder.head(params, x)
        if key is None:
            token = decoder.best_token(scores)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, s.step + 1), scores).astype(jnp.int32)
        live = s.left > 0
        left = jnp.where(stop[token], 0, jnp.maximum(s.left - 1, 0))
        said = jnp.where(live, token, jax.lax.dynamic_index_in_dim(s.said, here, 1, keepdims=False))
        said = jax.lax.dynamic_update_slice(s.said, said[:, None], (0, here))
        s = dataclasses.replace(s, keys=keys, values=values, said=said, step=s.step + 1)
        return dataclasses.replace(s, left=left, made=s.made + live, token=token)

    return jax.lax.while_loop(lambda s: jnp.sum(s.left > 0) > enough, step, state)


def attend_one(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """One query a slot: q [R, N, H], keys [R, K, H, C], values [R, K, C, H], mask [R, C] -> [R, N * H]."""
    slots, heads, width = q.shape
    q = split_heads(q).reshape(slots, keys.shape[1], -1, width)
    scores = jnp.einsum("rkgh,rkhc->rkgc", q, keys, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("rkgc,rkch->rkgh", jax.nn.softmax(scores).astype(values.dtype), values)
    return split_heads(out.reshape(slots, heads, width)).reshape(slots, heads * width)


@jax.jit
def keep_slots(state: Slots, slots: jax.Array) -> Slots:
    """The state of `slots` [r] alone."""
    kept = {name: getattr(state, name)[slots] for name in (*ROWS, "said")}
    return Slots(keys=state.keys[:, slots], values=state.values[:, slots], step=state.step, **kept)


def abstract_slots(params: Params, mesh: Mesh, slots: int, length: int, new_tokens: int) -> Slots:
    """Shapes and shardings of so many slots with `length` cached positions for what is read."""
    spec = params.spec
    heads, width, total = spec.n_kv_heads, spec.head_dim, length + new_tokens
    cache, row = (cache_sharding(mesh, slots, heads, axis) for axis in (1, 0))
    like = jax.ShapeDtypeStruct
    return Slots(
        keys=like((spec.n_layers, slots, heads, width, total), params.dtype, sharding=cache),
        values=like((spec.n_layers, slots, heads, total, width), params.dtype, sharding=cache),
        said=like((slots, new_tokens), jnp.int32, sharding=row),
        step=like((), jnp.int32, sharding=replicated(mesh)),
        **{name: like((slots,), jnp.int32, sharding=row) for name in ROWS},
    )


def empty_slots(params: Params, mesh: Mesh, slots: int, length: int, new_tokens: int) -> Slots:
    """Slots that are all free."""
    like = abstract_slots(params, mesh, slots, length, new_tokens)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), like)


class Continued(NamedTuple):
    """A text to be continued."""

    text: int  # its number
    places: np.ndarray  # of its tokens but the last among the pass's B * T
    last: int  # the last token
    room: int  # how many more are allowed


class Decoder:
    """Texts that are being continued, at most `slots` at a time, of at most `length` + 1 tokens. `add` takes
    what a pass has read, `finish` waits for all; both yield (text, tokens) of those that are done."""

    def __init__(
        self, params: Params, mesh: Mesh, slots: int, length: int, new_tokens: int, stop: np.ndarray
    ) -> None:
        self.params, self.mesh, self.length = params, mesh, length
        self.stop = place(stop, replicated(mesh))
        self.text = np.full(few_sizes(slots, LEAST, 4), -1)  # of each slot, -1: free
        self.state = empty_slots(params, mesh, len(self.text), length, new_tokens)

    def add(self, cache: decoder.KeysValues, texts: Sequence[Continued]) -> Iterator[tuple[int, list[int]]]:
        """Those of `texts` that a pass has left open, with its `cache`."""
        each = max(1, len(self.text) // 4)
        for start in range(0, len(texts), each):
            part = texts[start : start + each]
            yield from self._run(len(self.text) - len(part))
            slots, free = np.full(each, len(self.text), np.int32), np.flatnonzero(self.text < 0)
            index, pads = np.zeros((each, self.length), np.int32), np.full(each, self.length, np.int32)
            left, token = np.zeros((2, each), np.int32)
            for n, (text, places, last, room) in enumerate(part):
                slots[n], left[n], token[n], pads[n] = free[n], room, last, self.length - len(places)
                index[n, pads[n] :] = places
                self.text[free[n]] = text
            new = {"pads": pads, "left": left, "token": token}
            self.state = admit(self.state, cache, *jax.tree.map(self._put, (slots, index, new)))

    def finish(self) -> Iterator[tuple[int, list[int]]]:
        while (self.text >= 0).any():
            live = np.flatnonzero(self.text >= 0)
            size = few_sizes(len(live), LEAST, 1)
            if 2 * size <= len(self.text):
                idle = np.flatnonzero(self.text < 0)[: size - len(live)]
                slots = np.concatenate([live, idle]).astype(np.int32)
                self.text, self.state = self.text[slots], keep_slots(self.state, self._put(slots))
            # Until it can shrink to half or less, or, where it cannot, until all are done.
            quarter = len(self.text) // 4
            yield from self._run(quarter if 2 * few_sizes(quarter, LEAST, 1) <= len(self.text) else 0)

    def _put(self, a: np.ndarray | np.generic) -> jax.Array:
        return place(a, replicated(self.mesh))

    def _run(self, enough: int) -> Iterator[tuple[int, list[int]]]:
        """Decode until at most `enough` slots are taken; free those that are done."""
        if (self.text >= 0).sum() <= enough:
            return
        self.state = decode(self.params, self.state, self.stop, self._put(np.int32(enough)))
        left = fetch(self.state.left)
        done = np.flatnonzero((self.text >= 0) & (left == 0))
        for slot, tokens in zip(done, new_tokens(self.state, done), strict=True):
            yield int(self.text[slot]), tokens
            self.text[slot] = -1


def new_tokens(state: Slots, slots: np.ndarray) -> list[list[int]]:
    """The tokens that were made in each of `slots`, in their order."""
    made, begun, said = map(fetch, (state.made, state.begun, state.said))
    return [said[s, (begun[s] + np.arange(made[s])) % said.shape[1]].tolist() for s in slots]


def sample(
    params: Params, mesh: Mesh, start: int, stop: np.ndarray, seed: int, shape: tuple[int, int]
) -> list[list[int]]:
    """Token sequences from the model itself at temperature 1, `shape` (how many, their tokens at most). Each
    begins with `start` and ends with the first token of `stop` [V] bool; both are part of it."""
    count, length = shape
    found: list[list[int]] = []
    for part in range(-(-count // SAMPLE_SLOTS)):
        state = empty_slots(params, mesh, SAMPLE_SLOTS, 0, max(1, length - 1))
        full = np.ones(SAMPLE_SLOTS, np.int32)
        left, token = (place(n * full, state.left.sharding) for n in (length - 1, start))
        state, key = dataclasses.replace(state, left=left, token=token), jax.random.key(seed)
        inputs = (place(a, replicated(mesh)) for a in (stop, np.int32(0)))
        state = decode(params, state, *inputs, jax.random.fold_in(key, part))
        found += [[start, *tokens] for tokens in new_tokens(state, np.arange(SAMPLE_SLOTS))]
    return found[:count]

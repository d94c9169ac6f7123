"""The decoder: one layer, the loop over layers, and what the heads read. Pure functions of `Params`.

Letters: B rows, T positions of a row, S key positions, D model width, N query heads, K key/value heads, H
head width, F MLP width, V vocabulary, M target positions.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from locft_jax.data.packing import Rows, Targets
from locft_jax.model.sharding import for_keys, split_width, whole_width
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Params, Quantized, Weights, product, split_overrides, take_rows

Body = Callable[[Weights, Any, Any], Any]  # (a layer's weights, its number, carry) -> carry
KeysValues = tuple[jax.Array, jax.Array]  # [B, T, K, H] each


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [..., D] normalized in float32, scaled in x's dtype (as transformers does)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale


def rope_frequencies(spec: ModelSpec) -> jax.Array:
    """Rotary frequencies [H / 2], float32, with the checkpoint's scaling."""
    freq = spec.rope_theta ** (-jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    # llama3: long wavelengths are stretched, short ones kept, those between blended.
    wavelength = 2 * jnp.pi / freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = jnp.clip((scaling.original_max_position / wavelength - low) / (high - low), 0, 1)
    return freq * (blend + (1 - blend) / scaling.factor)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary embedding of x [..., T, heads, H] at positions [..., T]; angles in float32."""
    angle = positions[..., None, None].astype(jnp.float32) * frequencies  # [..., T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N * H]; softmax in float32."""
    batch, time, heads, width = q.shape
    q = q.reshape(batch, time, k.shape[2], -1, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores).astype(v.dtype), v)
    return out.reshape(batch, time, heads * width)


def segment_mask(q_segments: jax.Array, q_positions: jax.Array, rows: Rows, window: jax.Array) -> jax.Array:
    """[B, T] queries against the rows' [B, S] keys -> [B, T, S]: same text, not later, in window."""
    distance = q_positions[:, :, None] - rows.positions[:, None, :]
    same = q_segments[:, :, None] == rows.segments[:, None, :]
    return same & (distance >= 0) & (distance < window)


@dataclasses.dataclass(frozen=True)
class Attend:
    """What the callers of `layer` differ in: which tokens it is computed for, and what they attend to."""

    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
    """(q [..., N, H], k and v [..., K, H]) -> (attended [..., N * H], what the caller keeps of k and v)"""
    positions: jax.Array  # [...] of x's tokens, all of which have keys and values
    queried: jax.Array  # [...] positions of those that `select` picks
    select: Callable[[jax.Array], jax.Array] = lambda x: x  # x [..., D] -> tokens whose output is wanted
    stream: Callable[[jax.Array], jax.Array] = lambda x: x  # the residual stream's sharding between products


def packed(rows: Rows, window: jax.Array) -> Attend:
    """Packed rows [B, T], every token within its own text; keeps keys and values."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KeysValues]:
        return attention(q, k, v, segment_mask(rows.segments, rows.positions, rows, window)), (k, v)

    return Attend(attend, rows.positions, rows.positions, stream=split_width)


def packed_targets(rows: Rows, window: jax.Array, targets: Targets) -> Attend:
    """Packed rows where only M target positions are read: x [B, T, D] -> [M, D]. Keys and values need every
    position. Queries are laid out by row ([B, W]) for attention and are flat ([M]) for every product."""
    segments, positions = rows.segments.reshape(-1)[targets.at], rows.positions.reshape(-1)[targets.at]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KeysValues]:
        mask = segment_mask(segments[targets.of_row], positions[targets.of_row], rows, window)
        attended = attention(q[targets.of_row], k, v, mask)  # [B, W, N * H]
        return attended.reshape(-1, attended.shape[-1])[targets.slot], (k, v)

    return Attend(attend, rows.positions, positions, lambda x: x.reshape(-1, x.shape[-1])[targets.at])


def project(key: str, x: jax.Array, w: Weights) -> jax.Array:
    """x [..., in] through the matrix `key` [out, in] of a layer, with its bias -> [..., out]."""
    m, bias = w[key], w.get(f"{key}_bias")
    y = product(x, m, x.dtype) if isinstance(m, Quantized) else jnp.einsum("...d,fd->...f", x, m)
    return y if bias is None else y + bias


def layer(
    spec: ModelSpec, w: Weights, x: jax.Array, how: Attend, tap: Callable[..., jax.Array] = project
) -> tuple[jax.Array, Any]:
    """One decoder layer with weights `w`: x [..., D] -> (the selected tokens [..., D], what `how` keeps).
    `tap` stands in for `project`: it sees what enters and leaves each matrix."""
    with jax.named_scope("attention"):
        h = rms_norm(x, w["attn_norm"], spec.rms_eps)
        near, own = for_keys(h, spec.n_kv_heads), how.select(h)
        k = tap("k", near, w).reshape(*h.shape[:-1], spec.n_kv_heads, spec.head_dim)
        v = tap("v", near, w).reshape(*h.shape[:-1], spec.n_kv_heads, spec.head_dim)
        q = tap("q", whole_width(own), w).reshape(*own.shape[:-1], spec.n_heads, spec.head_dim)
        if spec.qk_norm:
            q, k = rms_norm(q, w["q_norm"], spec.rms_eps), rms_norm(k, w["k_norm"], spec.rms_eps)
        frequencies = rope_frequencies(spec)
        q, k = rotate(q, how.queried, frequencies), rotate(k, how.positions, frequencies)
        attended, kept = how.attend(q, k, v)
        x = how.stream(how.select(x) + tap("o", attended, w))
    with jax.named_scope("mlp"):
        h = whole_width(rms_norm(x, w["mlp_norm"], spec.rms_eps))
        x = how.stream(x + tap("down", jax.nn.silu(tap("gate", h, w)) * tap("up", h, w), w))
    return x, kept


def windows(spec: ModelSpec) -> jax.Array:
    """Attention window of each layer [L] int32."""
    return jnp.asarray(spec.windows, jnp.int32)


def stacks(weights: Weights) -> Weights:
    """The weights that belong to layers."""
    return {k: a for k, a in weights.items() if k not in ("embed", "norm", "head")}


def take_layer(weights: Weights, layer: jax.Array) -> dict[str, jax.Array]:
    """One layer's weights; `layer` may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), stacks(weights))


def fold_layers(params: Params, body: Body, carry: Any, start: int, stop: int) -> Any:
    """carry = body(layer's weights, layer, carry) for each layer in [start, stop). Runs of layers without
    overrides are one scan over layer *indices* (slices of the stack would copy it); a layer with overrides is
    unrolled, its own matrices in place of the frozen ones."""
    stacked, dtype = stacks(params.weights), params.dtype
    own = split_overrides(params.spec, params.overrides)[1]
    cuts = sorted({start, stop, *(l for e in own if start <= e < stop for l in (e, e + 1))})
    for first, end in itertools.pairwise(cuts):
        if end - first == 1:
            w = jax.tree.map(lambda a, l=first: a[l], stacked)
            carry = body(w | {k: a.astype(dtype) for k, a in own.get(first, {}).items()}, first, carry)
            continue

        # The backward pass slices the weights again: kept from the forward pass, the slices of
        # all layers would be a second copy of the stack. Products are kept, none is computed twice.
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
        def step(carry: Any, l: jax.Array) -> tuple[Any, None]:
            return body(take_layer(params.weights, l), l, carry), None

        carry, _ = jax.lax.scan(step, carry, jnp.arange(first, end))
    return carry


def run_layers(params: Params, x: jax.Array, rows: Rows, start: int, stop: int) -> jax.Array:
    """Residual stream x [B, T, D] of packed rows entering layer `start` -> entering layer `stop`."""
    spec, window = params.spec, windows(params.spec)
    return fold_layers(params, lambda w, l, x: layer(spec, w, x, packed(rows, window[l]))[0], x, start, stop)


def hidden_at_targets(
    params: Params, x: jax.Array, rows: Rows, targets: Targets, start: int = 0
) -> jax.Array:
    """Residual stream x [B, T, D] entering layer `start` -> the last layer's output at targets [M, D]."""
    spec, last = params.spec, params.spec.n_layers - 1
    x = run_layers(params, x, rows, start, last)
    how = packed_targets(rows, windows(spec)[last], targets)
    return fold_layers(params, lambda w, l, x: layer(spec, w, x, how)[0], x, last, last + 1)


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Token ids [...] -> [..., D]."""
    table: Any = split_overrides(params.spec, params.overrides)[0].get("embed", params.weights["embed"])
    if isinstance(table, Quantized):
        return take_rows(table, tokens, params.dtype)
    return table.astype(params.dtype)[tokens]


@jax.named_scope("head")
def head(params: Params, x: jax.Array) -> jax.Array:
    """Final norm and vocabulary projection: x [..., D] -> logits [..., V] in float32."""
    single = split_overrides(params.spec, params.overrides)[0]
    w: Weights = params.weights | {k: a.astype(params.dtype) for k, a in single.items()}
    x, table = whole_width(rms_norm(x, w["norm"], params.spec.rms_eps)), w.get("head", w["embed"])
    if isinstance(table, Quantized):
        return product(x, table, jnp.float32)
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


def best_token(scores: jax.Array) -> jax.Array:
    """The first arg-max of scores [..., V], int32. In two steps, the best of some blocks and its place there:
    XLA's single pass for both costs as much on a CPU as the projection itself."""
    blocks = math.gcd(scores.shape[-1], 64)
    parts = scores.reshape(*scores.shape[:-1], blocks, -1)
    block = jnp.argmax(jnp.max(parts, axis=-1), axis=-1)
    part = jnp.take_along_axis(parts, block[..., None, None], axis=-2)[..., 0, :]
    return (block * parts.shape[-1] + jnp.argmax(part, axis=-1)).astype(jnp.int32)


def logits(params: Params, tokens: jax.Array) -> jax.Array:
    """Plain causal forward of unpacked rows: tokens [B, T] -> logits [B, T, V] float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rows = Rows(jnp.ones(tokens.shape, jnp.int32), positions)
    return head(params, run_layers(params, embed(params, tokens), rows, 0, params.spec.n_layers))

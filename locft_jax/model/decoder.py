"""The decoder: one block, one layer loop, and what the heads read. Pure functions.

Letters: B rows, T positions of a row, S key positions, D model width, N query heads, K key/value
heads, G = N / K, H head width, F MLP width, V vocabulary, M target positions.

Everything takes `(weights, edits)`: `edits` maps HF tensor names to matrices that stand in for the
frozen ones, so an edited model is never a second copy of the weights.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from locft_jax.data.packing import Rows, Targets
from locft_jax.model.quantize import Quantized, product, take_rows
from locft_jax.model.sharding import for_keys, split_width, whole_width
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights, activation_dtype, split_edits

Body = Callable[[Weights, Any, Any], Any]
KeysValues = tuple[jax.Array, jax.Array]  # [B, T, K, H] each


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [..., D] normalized in float32, scaled in x's dtype (as transformers does)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale


def linear(x: jax.Array, w: jax.Array | Quantized, bias: jax.Array | None = None) -> jax.Array:
    """x [..., D], w [F, D] (HF layout) -> [..., F]."""
    y = product(x, w, x.dtype) if isinstance(w, Quantized) else jnp.einsum("...d,fd->...f", x, w)
    return y if bias is None else y + bias


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
    blend = (scaling.original_max_position / wavelength - low) / (high - low)
    return freq * (jnp.clip(blend, 0, 1) + (1 - jnp.clip(blend, 0, 1)) / scaling.factor)


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


def queries(spec: ModelSpec, w: Weights, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Normed x [..., D] at positions [...] -> rotated queries [..., N, H]."""
    q = linear(whole_width(x), w["q"], w.get("q_bias")).reshape(*x.shape[:-1], spec.n_heads, spec.head_dim)
    q = rms_norm(q, w["q_norm"], spec.rms_eps) if spec.qk_norm else q
    return rotate(q, positions, rope_frequencies(spec))


def keys_values(spec: ModelSpec, w: Weights, x: jax.Array, positions: jax.Array) -> KeysValues:
    """Normed x [..., D] at positions [...] -> rotated keys and values, each [..., K, H]."""
    shape, x = (*x.shape[:-1], spec.n_kv_heads, spec.head_dim), for_keys(x, spec.n_kv_heads)
    k = linear(x, w["k"], w.get("k_bias")).reshape(shape)
    v = linear(x, w["v"], w.get("v_bias")).reshape(shape)
    k = rms_norm(k, w["k_norm"], spec.rms_eps) if spec.qk_norm else k
    return rotate(k, positions, rope_frequencies(spec)), v


@jax.named_scope("mlp")
def mlp(spec: ModelSpec, w: Weights, x: jax.Array) -> jax.Array:
    """SwiGLU on the residual stream: x [..., D] -> x + mlp(norm(x))."""
    h = whole_width(rms_norm(x, w["mlp_norm"], spec.rms_eps))
    return x + linear(jax.nn.silu(linear(h, w["gate"])) * linear(h, w["up"]), w["down"])


def windows(spec: ModelSpec) -> jax.Array:
    """Attention window of each layer [L] int32."""
    return jnp.asarray(spec.windows, jnp.int32)


def segment_mask(q_segments: jax.Array, q_positions: jax.Array, rows: Rows, window: jax.Array) -> jax.Array:
    """[B, T] queries against the rows' [B, S] keys -> [B, T, S]: same text, not later, in window."""
    distance = q_positions[:, :, None] - rows.positions[:, None, :]
    same = q_segments[:, :, None] == rows.segments[:, None, :]
    return same & (distance >= 0) & (distance < window)


@jax.named_scope("block")
def block(
    spec: ModelSpec, w: Weights, x: jax.Array, rows: Rows, window: jax.Array
) -> tuple[jax.Array, KeysValues]:
    """One decoder layer on packed rows: x [B, T, D] -> [B, T, D], and its keys and values."""
    h = rms_norm(x, w["attn_norm"], spec.rms_eps)
    k, v = keys_values(spec, w, h, rows.positions)
    mask = segment_mask(rows.segments, rows.positions, rows, window)
    x = split_width(x + linear(attention(queries(spec, w, h, rows.positions), k, v, mask), w["o"]))
    return split_width(mlp(spec, w, x)), (k, v)


@jax.named_scope("last_block")
def last_block(
    spec: ModelSpec,
    w: Weights,
    x: jax.Array,
    rows: Rows,
    window: jax.Array,
    targets: Targets,
) -> tuple[jax.Array, KeysValues]:
    """The same layer where only M target positions are read: x [B, T, D] -> [M, D], keys and values.

    Keys and values need every position; query, output and MLP only the targets. Queries are laid
    out by row ([B, W]) for the attention itself and are flat ([M]) for every matrix product.
    """
    h = rms_norm(x, w["attn_norm"], spec.rms_eps)
    k, v = keys_values(spec, w, h, rows.positions)
    segments, positions = rows.segments.reshape(-1)[targets.at], rows.positions.reshape(-1)[targets.at]
    q = queries(spec, w, h.reshape(-1, spec.d_model)[targets.at], positions)[targets.of_row]
    mask = segment_mask(segments[targets.of_row], positions[targets.of_row], rows, window)
    attended = attention(q, k, v, mask)  # [B, W, N * H]
    attended = attended.reshape(-1, attended.shape[-1])[targets.slot]  # [M, N * H]
    return mlp(spec, w, x.reshape(-1, spec.d_model)[targets.at] + linear(attended, w["o"])), (k, v)


def stacks(weights: Weights) -> Weights:
    """The weights that belong to layers."""
    return {k: a for k, a in weights.items() if k not in ("embed", "norm", "head")}


def take_layer(weights: Weights, layer: jax.Array) -> dict[str, jax.Array]:
    """One layer's weights; `layer` may be traced."""
    own = lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)  # noqa: E731
    return jax.tree.map(own, stacks(weights))


def fold_layers(
    spec: ModelSpec, weights: Weights, edits: Overrides, body: Body, carry: Any, start: int, stop: int
) -> Any:
    """carry = body(layer's weights, layer, carry) for each layer in [start, stop).

    Runs of unedited layers are one scan over layer *indices* (slices of the stack would copy it);
    a layer with edits stands by itself, its edited matrices in place of the frozen ones.
    """
    stacked = stacks(weights)
    edited, dtype = split_edits(spec, edits)[1], activation_dtype(weights)
    cuts = sorted({start, stop, *(l for e in edited if start <= e < stop for l in (e, e + 1))})
    for first, end in zip(cuts, cuts[1:], strict=False):
        if end - first == 1:
            w = jax.tree.map(lambda a, l=first: a[l], stacked)
            w |= {k: a.astype(dtype) for k, a in edited.get(first, {}).items()}
            carry = body(w, first, carry)
        else:
            # The backward pass slices the weights again: kept from the forward pass, the slices of
            # all layers would be a second copy of the stack. Products are kept, none is computed twice.
            step = jax.checkpoint(
                lambda c, l: body(take_layer(weights, l), l, c),
                policy=jax.checkpoint_policies.dots_saveable,
                prevent_cse=False,
            )

            def one(c: Any, l: jax.Array, step: Any = step) -> tuple[Any, None]:
                return step(c, l), None

            carry, _ = jax.lax.scan(one, carry, jnp.arange(first, end))
    return carry


def embed(spec: ModelSpec, weights: Weights, edits: Overrides, tokens: jax.Array) -> jax.Array:
    """Token ids [...] -> [..., D]."""
    dtype = activation_dtype(weights)
    table: Any = split_edits(spec, edits)[0].get("embed", weights["embed"])
    return take_rows(table, tokens, dtype) if isinstance(table, Quantized) else table.astype(dtype)[tokens]


@jax.named_scope("head")
def head(spec: ModelSpec, weights: Weights, edits: Overrides, x: jax.Array) -> jax.Array:
    """Final norm and vocabulary projection: x [..., D] -> logits [..., V] in float32."""
    single = {k: a.astype(activation_dtype(weights)) for k, a in split_edits(spec, edits)[0].items()}
    w: Weights = {k: single.get(k, weights[k]) for k in ("embed", "norm", "head") if k in weights}
    x, table = whole_width(rms_norm(x, w["norm"], spec.rms_eps)), w.get("head", w["embed"])
    if isinstance(table, Quantized):
        return product(x, table, jnp.float32)
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


def best_token(scores: jax.Array) -> jax.Array:
    """The first arg-max of scores [..., V], int32. In two steps, the best of some blocks and its place in
    that block: XLA's single pass for both costs as much on a CPU as the projection itself."""
    blocks = math.gcd(scores.shape[-1], 64)
    parts = scores.reshape(*scores.shape[:-1], blocks, -1)
    block = jnp.argmax(jnp.max(parts, axis=-1), axis=-1)
    part = jnp.take_along_axis(parts, block[..., None, None], axis=-2)[..., 0, :]
    return (block * parts.shape[-1] + jnp.argmax(part, axis=-1)).astype(jnp.int32)


def run_layers(
    spec: ModelSpec, weights: Weights, edits: Overrides, x: jax.Array, rows: Rows, start: int, stop: int
) -> jax.Array:
    """Residual stream x [B, T, D] entering layer `start` -> entering layer `stop`."""
    window = windows(spec)
    body = lambda w, l, x: block(spec, w, x, rows, window[l])[0]  # noqa: E731
    return fold_layers(spec, weights, edits, body, x, start, stop)


def hidden_at_targets(
    spec: ModelSpec,
    weights: Weights,
    edits: Overrides,
    x: jax.Array,
    rows: Rows,
    targets: Targets,
    start: int = 0,
) -> jax.Array:
    """Residual stream x [B, T, D] entering layer `start` -> the last layer's output at the target
    positions [M, D]."""
    last = spec.n_layers - 1
    if start < last:
        x = run_layers(spec, weights, edits, x, rows, start, last)
    window = windows(spec)
    body = lambda w, l, x: last_block(spec, w, x, rows, window[l], targets)[0]  # noqa: E731
    return fold_layers(spec, weights, edits, body, x, last, last + 1)


def logits(spec: ModelSpec, weights: Weights, edits: Overrides, tokens: jax.Array) -> jax.Array:
    """Plain causal forward of unpacked rows: tokens [B, T] -> logits [B, T, V] float32.

    For tests, scoring short texts and `CausalLM`; editing and evaluation use the paths above.
    """
    batch, time = tokens.shape
    rows = Rows(
        jnp.ones((batch, time), jnp.int32),
        jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time)),
    )
    x = embed(spec, weights, edits, tokens)
    x = run_layers(spec, weights, edits, x, rows, 0, spec.n_layers)
    return head(spec, weights, edits, x)

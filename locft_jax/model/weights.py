"""THE weight table: one row a tensor. Shapes, shardings, loading, saving and sites derive from it.

Matrices stay in the Hugging Face layout [out, in]: nothing is ever transposed, and an exported tensor is byte
for byte what was loaded. Rows of the layers are stacked: [layer, out, in].
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locft_jax.model.spec import ModelSpec

Weights = dict[str, Any]  # row key -> jax.Array or Quantized, layers stacked on axis 0
Overrides = Mapping[str, jax.Array]  # HF tensor name -> matrix that replaces the frozen one
LARGEST = 127  # of the int8 values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An int8 matrix [out, in], or a stack [L, out, in]: scale[..., None] * values, one scale an output.
    Products are computed with the values and scaled afterwards: there is no dequantized copy of a stack, and
    a gradient flows through to the activations."""

    values: Any  # int8 [L, out, in] or [out, in]
    scale: Any  # float32 [L, out] or [out]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weights", "overrides"), meta_fields=("spec",)
)
@dataclasses.dataclass(frozen=True)
class Params:
    """The model as `jax.jit` sees it: one pytree, whose spec is static."""

    spec: ModelSpec
    weights: Weights  # frozen
    overrides: Overrides = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> Any:
        """dtype of the activations: that of the norms, which are never int8."""
        return self.weights["norm"].dtype

    def over(self, overrides: Overrides) -> "Params":
        """The same frozen weights with these overrides in place of its own."""
        return dataclasses.replace(self, overrides=dict(overrides))


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or one tensor a layer."""

    key: str  # our name
    hf: str  # HF name; `{}` stands for the layer
    shape: tuple[int, ...]  # of one HF tensor
    axes: tuple[str | None, ...]  # what each dimension is: sharding.py maps these to mesh axes
    layers: int = 0  # 0: a single tensor; L: stacked [L, *shape]

    def names(self) -> list[str]:
        return [self.hf.format(i) for i in range(self.layers)] if self.layers else [self.hf]

    @property
    def stacked(self) -> tuple[int, ...]:
        """Shape of all its tensors in one array."""
        return (self.layers, *self.shape) if self.layers else self.shape

    @property
    def matrix(self) -> bool:
        """Whether it is one that `weights: int8` makes int8."""
        return len(self.shape) == 2

    def scales(self) -> "Row":
        """The row of a matrix's int8 scales: one an output."""
        return dataclasses.replace(self, shape=self.shape[:1], axes=self.axes[:1])


def weight_table(spec: ModelSpec) -> dict[str, Row]:
    """Every tensor of the model, in checkpoint order. The axes that have a name may be sharded."""
    d, f, h = spec.d_model, spec.d_ff, spec.head_dim
    q, kv, layers = spec.n_heads * h, spec.n_kv_heads * h, spec.n_layers
    rows: list[Row] = [Row("embed", "model.embed_tokens.weight", (spec.vocab_size, d), ("vocab", None))]

    def layer(key: str, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
        rows.append(Row(key, f"model.layers.{{}}.{name}", shape, axes, layers))

    layer("attn_norm", "input_layernorm.weight", (d,), (None,))
    layer("q", "self_attn.q_proj.weight", (q, d), ("heads", None))
    layer("k", "self_attn.k_proj.weight", (kv, d), ("kv_heads", None))
    layer("v", "self_attn.v_proj.weight", (kv, d), ("kv_heads", None))
    if spec.qkv_bias:
        layer("q_bias", "self_attn.q_proj.bias", (q,), ("heads",))
        layer("k_bias", "self_attn.k_proj.bias", (kv,), ("kv_heads",))
        layer("v_bias", "self_attn.v_proj.bias", (kv,), ("kv_heads",))
    if spec.qk_norm:
        layer("q_norm", "self_attn.q_norm.weight", (h,), (None,))
        layer("k_norm", "self_attn.k_norm.weight", (h,), (None,))
    layer("o", "self_attn.o_proj.weight", (d, q), (None, "heads"))
    layer("mlp_norm", "post_attention_layernorm.weight", (d,), (None,))
    layer("gate", "mlp.gate_proj.weight", (f, d), ("mlp", None))
    layer("up", "mlp.up_proj.weight", (f, d), ("mlp", None))
    layer("down", "mlp.down_proj.weight", (d, f), (None, "mlp"))
    rows.append(Row("norm", "model.norm.weight", (d,), (None,)))
    if not spec.tie_embeddings:
        rows.append(Row("head", "lm_head.weight", (spec.vocab_size, d), ("vocab", None)))
    return {row.key: row for row in rows}


def abstract_weights(spec: ModelSpec, dtype: jnp.dtype, int8: bool = False) -> Weights:
    """The weights' shapes without values: {key: [L, *shape] or [*shape]} in `dtype`, or Quantized of such."""
    array = jax.ShapeDtypeStruct
    return {
        key: Quantized(array(row.stacked, jnp.int8), array(row.scales().stacked, jnp.float32))
        if int8 and row.matrix
        else array(row.stacked, dtype)
        for key, row in weight_table(spec).items()
    }


def init_weights(spec: ModelSpec, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Weights:
    """Random weights: norms 1, biases 0, matrices normal(0, 0.02) as in Llama."""
    weights = {}
    for row in weight_table(spec).values():
        key, sub = jax.random.split(key)
        constant = jnp.full(row.stacked, "norm" in row.key, dtype)
        drawn = 0.02 * jax.random.normal(sub, row.stacked) if row.matrix else constant
        weights[row.key] = drawn.astype(dtype)
    return weights


def locate_tensor(spec: ModelSpec, name: str) -> tuple[Row, int | None]:
    """HF tensor name -> (its row, its layer or None). Raises KeyError for a name the model lacks."""
    match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    template = f"model.layers.{{}}.{match[2]}" if match else name
    layer = int(match[1]) if match else None
    row = next((row for row in weight_table(spec).values() if row.hf == template), None)
    if row is None or (layer or 0) >= max(1, row.layers):
        raise KeyError(name)
    return row, layer


def take_tensor(params: Params, name: str) -> Any:
    """One HF tensor out of the (stacked) frozen weights: a jax.Array, or a Quantized."""
    row, layer = locate_tensor(params.spec, name)
    stack = params.weights[row.key]
    return stack if layer is None else jax.tree.map(lambda a: a[layer], stack)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, layer: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), layer, 0)


def put_tensors(params: Params, tensors: Overrides) -> Params:
    """`tensors` (of layers) written into their stacks, in place: those given are used up. What runs on the
    result is compiled without overrides, once for whatever was put there."""
    weights = dict(params.weights)
    for name, value in tensors.items():
        row, layer = locate_tensor(params.spec, name)
        weights[row.key] = _put_layer(weights[row.key], jnp.int32(layer), value)
    return dataclasses.replace(params, weights=weights)


def split_overrides(
    spec: ModelSpec, overrides: Overrides
) -> tuple[dict[str, jax.Array], dict[int, dict[str, jax.Array]]]:
    """Overrides by HF name -> (those of single tensors by key, those of each layer by key)."""
    single: dict[str, jax.Array] = {}
    layers: dict[int, dict[str, jax.Array]] = {}
    for name, value in overrides.items():
        row, layer = locate_tensor(spec, name)
        (single if layer is None else layers.setdefault(layer, {}))[row.key] = value
    return single, layers


def row_scales(block: np.ndarray) -> np.ndarray:
    """Scales [R] of whole rows [R, in], float32: the largest absolute value / 127; 1 where a row is zero (or
    too small for a scale), NaN or infinite where the row is."""
    with np.errstate(invalid="ignore"):
        largest = np.abs(block.astype(np.float32, copy=False)).max(axis=1)
        zero = largest < LARGEST * np.finfo(np.float32).tiny
    return np.where(zero, np.float32(1), largest / np.float32(LARGEST))


def quantize_rows(block: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows, or the same part of each, [R, C] by their scales [R] -> int8, rounded half to even."""
    with np.errstate(invalid="ignore"):  # of a row that is not finite: its scale says so
        scaled = block.astype(np.float32, copy=False) / scale[:, None]
        return np.rint(scaled, out=scaled).astype(np.int8)


def product(x: jax.Array, w: Quantized, dtype: Any) -> jax.Array:
    """x [..., in] times w [out, in] -> [..., out] in `dtype`."""
    # float16 ends at 65,504: sums of values up to 127 need more.
    wide = jnp.promote_types(dtype, jnp.bfloat16)
    y = jnp.einsum("...d,fd->...f", x, w.values.astype(x.dtype), preferred_element_type=wide)
    return (y * w.scale).astype(dtype)


def take_rows(w: Quantized, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows `index` [...] of w [out, in] -> [..., in] in `dtype`."""
    return (w.values[index] * w.scale[index][..., None]).astype(dtype)

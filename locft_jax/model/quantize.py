"""int8 frozen weights: symmetric, one scale an output channel, which is a row of the HF layout [out, in].

Every matrix (seven projections a layer, embedding, head) is int8 values and float32 scales; norms and
biases stay in the activations' dtype. Products are computed with the values and scaled afterwards, so no
dequantized copy of a stack exists, and a gradient flows through to the activations.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [out, in], or a stack of them [L, out, in]: scale[..., None] * values."""

    values: Any  # int8 [L, out, in] or [out, in]
    scale: Any  # float32 [L, out] or [out]


def row_scales(block: np.ndarray) -> np.ndarray:
    """Scales [R] of whole rows [R, in], float32: the largest absolute value / 127; 1 where a row is zero (or
    too small for a scale). NaN or infinite where the row is."""
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

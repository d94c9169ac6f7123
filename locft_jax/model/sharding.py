"""The mesh, the only place where it is made, and what lies where on it. Two axes: `data` splits the rows of a
batch, `model` splits heads, MLP width and vocabulary. A dimension that the `model` axis does not divide is
replicated: slower, never wrong.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from locft_jax.data.packing import Batch
from locft_jax.errors import UserError
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Quantized, Row, Weights, weight_table


def make_mesh(shape: Mapping[str, int] | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """`{data: 1, model: -1}` over the devices present, those of all processes; -1 takes what is left. Raises
    UserError when the product does not fit their number, or, with several processes, leaves some idle."""
    devices = jax.devices() if devices is None else devices
    processes = len({d.process_index for d in devices})
    sizes = resolve_sizes(shape or {}, len(devices))
    if sizes and processes > 1 and sizes["data"] * sizes["model"] < len(devices):
        sizes = None  # a process without a device could not take part
    if sizes is None:
        of = f" of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"mesh: {dict(shape or {})} does not fit {len(devices)} device(s){of}; data x model must "
            f"{'be' if of else 'divide'} {len(devices)}, for example {{data: 1, model: {len(devices)}}}"
        )
    grid = sizes["data"], sizes["model"]
    return jax.make_mesh(grid, ("data", "model"), (AxisType.Auto,) * 2, devices=devices[: math.prod(grid)])


def resolve_sizes(shape: Mapping[str, int], count: int) -> dict[str, int] | None:
    """Sizes of both axes over `count` devices, -1 replaced by what is left; None where they do not fit."""
    sizes = {"data": 1, "model": -1, **shape}
    known = math.prod(s for s in sizes.values() if s > 0)
    if -1 in sizes.values() and count % known == 0:
        sizes = {k: count // known if s == -1 else s for k, s in sizes.items()}
    total = sizes["data"] * sizes["model"]
    return None if min(sizes.values()) < 1 or total > count or count % total else sizes


def tensor_spec(mesh: Mesh | AbstractMesh, spec: ModelSpec, row: Row, stacked: bool = True) -> P:
    """Partition of one row of the weight table (with its layer axis, if it has one)."""
    size = mesh.shape["model"]
    # Splitting inside a head would split its rotary pairs: heads are split whole or not at all.
    units = {"vocab": spec.vocab_size, "heads": spec.n_heads, "kv_heads": spec.n_kv_heads, "mlp": spec.d_ff}
    parts = ["model" if a and size > 1 and units[a] % size == 0 else None for a in row.axes]
    if row.axes == ("kv_heads", None) and parts[0] is None and size > 1 and spec.d_model % size == 0:
        parts[1] = "model"  # fewer heads than devices: split what is summed over
    return _spelled([None, *parts] if row.layers and stacked else parts)


def _spelled(parts: list[Any]) -> P:
    """As JAX writes a result's partition (no axis of size 1, no None at the end): a step's state is the next
    step's input, and another spelling would compile the step a second time."""
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def tensor_sharding(mesh: Mesh, spec: ModelSpec, row: Row, stacked: bool = True) -> NamedSharding:
    """`tensor_spec` on its mesh."""
    return NamedSharding(mesh, tensor_spec(mesh, spec, row, stacked))


def weight_shardings(mesh: Mesh, spec: ModelSpec, int8: bool = False) -> Weights:
    """Where all weights lie: the tree of `abstract_weights`, a NamedSharding for each array."""
    place = lambda row: tensor_sharding(mesh, spec, row)  # noqa: E731
    return {
        key: Quantized(place(row), place(row.scales())) if int8 and row.matrix else place(row)
        for key, row in weight_table(spec).items()
    }


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Batch arrays [rows, ...]: split over `data` where it divides them."""
    return NamedSharding(mesh, P("data") if rows % mesh.shape["data"] == 0 else P())


def cache_sharding(mesh: Mesh, rows: int, heads: int, axis: int = 1) -> NamedSharding:
    """Arrays of a KV cache [L, rows, heads, ...], or (`axis` 0) [rows, ...]: rows split over `data`,
    heads over `model`, where those divide them; with fewer heads than devices, rows over both."""
    split = lambda name, size: name if mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None  # noqa: E731
    parts: list[Any] = [None, split("data", rows), split("model", heads)]
    if axis and parts[2] is None and mesh.shape["model"] > 1 and rows % mesh.size == 0:
        parts[1] = ("data", "model") if mesh.shape["data"] > 1 else "model"
    return NamedSharding(mesh, _spelled(parts if axis else parts[1:2]))


def width_split(mesh: Mesh | AbstractMesh, d_model: int) -> int:
    """Into how many parts the width of activations is split: 1 where the `model` axis does not divide it."""
    return mesh.shape["model"] if d_model % mesh.shape["model"] == 0 else 1


def source_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """What a step looks up in: token ids [total] lie everywhere, activations [total, D] are split."""
    split = len(shape) == 2 and width_split(mesh, shape[1]) > 1
    return NamedSharding(mesh, P(None, "model") if split else P())


def split_width(x: jax.Array) -> jax.Array:
    """x [..., D] with D split over its mesh's `model` axis, where that divides it: the residual stream
    between products, of which a step keeps every layer's for the backward pass."""
    return _constrained(x, "model")


def whole_width(x: jax.Array) -> jax.Array:
    """x [..., D] with all of D on every device: what enters a product whose outputs are split."""
    return _constrained(x, None)


def for_keys(x: jax.Array, heads: int) -> jax.Array:
    """x [..., D] as the key and value matrices of so many heads want it (`tensor_spec`): whole, or split
    where heads are too few. Left to itself the compiler gathers the matrices, which are larger."""
    few = heads % jax.typeof(x).sharding.mesh.shape.get("model", 1)
    return split_width(x) if few else whole_width(x)


def split_heads(x: jax.Array) -> jax.Array:
    """x [rows, heads, H] with heads over `model` and rows over `data`, where those divide them: between
    products with split matrices and a KV cache that may be split otherwise."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.shape.get("model", 1) == 1:
        return x
    split = lambda name, size: name if size % mesh.shape[name] == 0 else None  # noqa: E731
    spec = P(split("data", x.shape[0]), split("model", x.shape[1]), None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _constrained(x: jax.Array, part: str | None) -> jax.Array:
    mesh = jax.typeof(x).sharding.mesh  # empty on a single device
    size = mesh.shape.get("model", 1)
    if size == 1 or x.shape[-1] % size:
        return x
    spec = P(*[P.UNCONSTRAINED] * (x.ndim - 1), part)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """A value of the host, the same in every process, or an array of this mesh, where `sharding` wants it.
    Each process sends what its own devices hold and waits for no other: threads may call this."""
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return jax.device_put(value, sharding)
    own = np.asarray(value, jnp.result_type(value))
    return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])


def fetch(value: Any) -> np.ndarray:
    """A value on the host, whole. With several processes all of them must ask, and each gets all of it."""
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(value, tiled=True)
    return np.asarray(value)


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Where the arrays of a packed batch go: rows split over `data`, target lists everywhere."""
    rows = rows_sharding(mesh, batch.index.shape[0])
    return jax.tree.map(lambda a: rows if a.ndim == 2 else replicated(mesh), batch)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Send a packed batch to the mesh."""
    return jax.tree.map(place, batch, batch_shardings(batch, mesh))

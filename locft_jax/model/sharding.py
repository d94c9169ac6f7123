"""The mesh, the only place where it is made, and what lies where on it.

Two axes: `data` splits the rows of a batch, `model` splits heads, MLP width and vocabulary. A
dimension that the `model` axis does not divide is replicated: slower, never wrong.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from locft_jax.errors import UserError
from locft_jax.model.quantize import Quantized
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Row, Weights, weight_table


def make_mesh(shape: Mapping[str, int] | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """`{data: 1, model: -1}` over the devices present; -1 takes what is left.

    Raises UserError when the product does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": 1, "model": -1, **(shape or {})}
    known = math.prod(s for s in sizes.values() if s > 0)
    if -1 in sizes.values() and len(devices) % known == 0:
        sizes = {k: len(devices) // known if s == -1 else s for k, s in sizes.items()}
    total = sizes["data"] * sizes["model"]
    if min(sizes.values()) < 1 or total > len(devices) or len(devices) % total:
        raise UserError(
            f"mesh: {dict(shape or {})} does not fit {len(devices)} device(s); "
            f"data x model must divide {len(devices)}, for example {{data: 1, model: {len(devices)}}}"
        )
    return jax.make_mesh(
        (sizes["data"], sizes["model"]),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:total],
    )


def tensor_spec(mesh: Mesh | AbstractMesh, spec: ModelSpec, row: Row, stacked: bool = True) -> P:
    """Partition of one row of the weight table (with its layer axis, if it has one)."""
    size = mesh.shape["model"]
    # Splitting inside a head would split its rotary pairs: heads are split whole or not at all.
    units = {"vocab": spec.vocab_size, "heads": spec.n_heads, "kv_heads": spec.n_kv_heads, "mlp": spec.d_ff}
    parts = ["model" if a and size > 1 and units[a] % size == 0 else None for a in row.axes]
    return _spelled([None, *parts] if row.layers and stacked else parts)


def _spelled(parts: list[str | None]) -> P:
    """As JAX writes a result's partition (no axis of size 1, no None at the end): a step's state is the
    next step's input, and another spelling would compile the step a second time."""
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
    heads over `model`, where those divide them."""
    split = lambda name, size: name if mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None  # noqa: E731
    parts = [split("data", rows)] if axis == 0 else [None, split("data", rows), split("model", heads)]
    return NamedSharding(mesh, _spelled(parts))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())

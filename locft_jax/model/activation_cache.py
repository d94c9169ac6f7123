"""Cached activations below the site: nothing below the lowest tuned layer changes, so what enters it is
computed once and looked up by the packed batches' indices. A stated budget decides where: on the device, in
host memory, in a file, or nowhere (the layers below are then run again in every step).
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import Batch, Corpus, Rows, even_rows, fit_shape, pack, sequential_batches
from locft_jax.errors import UserError
from locft_jax.model import decoder
from locft_jax.model.sharding import (
    fetch,
    place,
    place_batch,
    replicated,
    rows_sharding,
    source_sharding,
    width_split,
)
from locft_jax.model.weights import Params

MODES = ("device", "host", "disk", "off")
ROWS = 32  # packed rows of a pass


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("layer",))
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a step looks its batch up in: token ids [total] at layer 0, else what enters it [total, D]."""

    values: Any
    layer: int  # static

    def enter(self, params: Params, index: jax.Array) -> jax.Array:
        """The residual stream [B, T, D] of a packed batch at the layer."""
        return decoder.embed(params, self.values[index]) if self.values.ndim == 1 else self.values[index]


@dataclasses.dataclass(frozen=True)
class Source:
    """Inputs of a whole corpus."""

    values: Any  # [total] int32 (layer 0), or [total, D]: a jax array, numpy array or memory map
    layer: int
    mode: str  # one of MODES

    def feed(self, batch: Batch, mesh: Mesh) -> tuple[Inputs, Batch]:
        """A packed batch on the mesh and the inputs that its index points into: of host values, its own."""
        values = self.values
        if not isinstance(values, jax.Array):
            values = np.ascontiguousarray(values[batch.index.reshape(-1)])
            index = np.arange(batch.index.size, dtype=np.int32).reshape(batch.index.shape)
            batch = dataclasses.replace(batch, index=index)
        inputs = Inputs(place(values, source_sharding(mesh, values.shape)), self.layer)
        return inputs, place_batch(batch, mesh)


def token_source(corpus: Corpus, mesh: Mesh) -> Source:
    """No cache: steps embed the tokens and run every layer."""
    return Source(place(corpus.tokens, replicated(mesh)), 0, "off")


def choose_mode(mode: str, layer: int, size: int, budgets: tuple[float, float], split: int = 1) -> str:
    """Where `size` bytes of activations go, of which a device would hold a `split`th. `auto`: the device,
    else the host, else a file; a site at layer 0 has nothing below it. `budgets`: bytes (device, host).
    Raises UserError when a mode that was asked for exceeds its budget."""
    if layer == 0 or mode == "off":
        return "off"
    room = {"device": budgets[0] * split, "host": budgets[1], "disk": float("inf")}
    if mode == "auto":
        return next(m for m, budget in room.items() if size <= budget)
    if size > room[mode]:
        raise UserError(
            f"activation_cache: {mode} needs {size / 2**30:.2f} GiB, the budget is "
            f"{room[mode] / 2**30:.2f} GiB; use activation_cache=auto or a larger memory_budget"
        )
    return mode


def mode_for(
    params: Params, mesh: Mesh, mode: str, layer: int, tokens: int, budgets: tuple[float, float]
) -> str:
    """`choose_mode` for the activations of so many tokens that enter `layer`."""
    width = params.spec.d_model
    size = tokens * width * np.dtype(params.dtype).itemsize
    return choose_mode(mode, layer, size, budgets, width_split(mesh, width))


@functools.partial(jax.jit, static_argnums=0)
def cache_pass(stop: int, params: Params, tokens: jax.Array, rows: Rows) -> jax.Array:
    """Token ids [B, T] of packed rows -> what enters layer `stop` [B, T, D]."""
    return decoder.run_layers(params, decoder.embed(params, tokens), rows, 0, stop)


def empty_values(mode: str, params: Params, tokens: int) -> np.ndarray:
    """Room for the activations of so many tokens [tokens, D], zeros; on disk: an unnamed file."""
    shape = tokens, params.spec.d_model
    if mode != "disk":
        return np.zeros(shape, params.dtype)
    with tempfile.TemporaryFile() as f:  # unlinked while open: it can never be left behind
        return np.memmap(f, params.dtype, "w+", shape=shape)


def filled_source(values: np.ndarray, layer: int, mode: str, mesh: Mesh) -> Source:
    """What `empty_values` gave, with activations in it, where `mode` wants it."""
    kept = place(values, source_sharding(mesh, values.shape)) if mode == "device" else values
    return Source(kept, layer, mode)


def cached_source(
    params: Params, corpus: Corpus, layer: int, mode: str, mesh: Mesh, row_length: int
) -> Source:
    """Run every example once through the layers below `layer` and keep what comes out, in corpus order (zeros
    at the last tokens, which no batch reads). `mode`: as `choose_mode` returned it; `row_length`: tokens of a
    packed row. Of several processes each computes its share, and all get, and keep, all of it."""
    if mode == "off":
        return token_source(corpus, mesh)
    values = empty_values(mode, params, len(corpus.tokens))
    for batch, used in _passes(corpus, mesh, row_length):
        ids = place(corpus.tokens[batch.index], rows_sharding(mesh, len(batch.index)))
        values[batch.index[used]] = fetch(cache_pass(layer, params, ids, batch.rows))[used]
    return filled_source(values, layer, mode, mesh)


def _passes(corpus: Corpus, mesh: Mesh, row_length: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example once, in packed batches of one shape; of each where its texts are [B, T] bool."""
    length, rows = even_rows(corpus, row_length, ROWS, mesh.shape["data"])
    for which in sequential_batches(corpus, rows, length):
        batch = pack(corpus, which, dataclasses.replace(fit_shape(corpus, [which], length), rows=rows))
        assert batch is not None, "sequential_batches keeps to the rows"
        yield batch, batch.rows.segments > 0


@jax.jit
def layer_pass(
    params: Params, layer: jax.Array, values: jax.Array, index: jax.Array, rows: Rows
) -> jax.Array:
    """What enters `layer` (traced: one compilation serves all of them) -> what enters the next [B, T, D].
    `values` as in `Inputs`, looked up by `index` [B, T]."""
    x, w = Inputs(values, 0).enter(params, index), decoder.take_layer(params.weights, layer)
    how = decoder.packed(rows, decoder.windows(params.spec)[layer])
    return decoder.layer(params.spec, w, x, how)[0]


def advance(params: Params, corpus: Corpus, source: Source, mode: str, mesh: Mesh, row_length: int) -> Source:
    """The cache one layer higher, by one layer for every example instead of all below it. `source` is used up
    where it is on the host or on disk (its array is written over); `mode` as of the new one."""
    values = source.values
    if isinstance(values, jax.Array) or values.ndim == 1:
        values = empty_values(mode, params, len(corpus.tokens))
    layer = place(np.int32(source.layer), replicated(mesh))
    for batch, used in _passes(corpus, mesh, row_length):
        inputs, placed = source.feed(batch, mesh)
        out = layer_pass(params.over({}), layer, inputs.values, placed.index, placed.rows)
        values[batch.index[used]] = fetch(out)[used]
    return filled_source(values, source.layer + 1, mode, mesh)

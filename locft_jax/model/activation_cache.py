"""Cached activations below the site: what enters the lowest tuned layer is the same in every epoch,
because nothing below it changes. Computed once, then looked up by the packed batches' indices.

Where the cache lies is chosen from a stated budget: on the device, in host memory, in a file, or
nowhere (the layers below are then run again in every step).
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import Batch, Corpus, Rows, even_rows, fit_shape, pack, sequential_batches
from locft_jax.errors import UserError
from locft_jax.model import decoder
from locft_jax.model.sharding import fetch, place, replicated, rows_sharding, source_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights, activation_dtype

MODES = ("device", "host", "disk", "off")


@dataclasses.dataclass(frozen=True)
class Source:
    """What the steps read: flat token ids (layer 0) or flat activations entering `layer`."""

    values: Any  # [total] int32, or [total, D]: a jax array, numpy array or memory map
    layer: int
    mode: str  # one of MODES

    def feed(self, batch: Batch) -> tuple[Any, Batch]:
        """(array to look up in, batch whose index points into it). On the host the batch's own
        activations are gathered here, so that only they travel."""
        if isinstance(self.values, jax.Array):
            return self.values, batch
        own = np.ascontiguousarray(self.values[batch.index.reshape(-1)])
        index = np.arange(batch.index.size, dtype=np.int32).reshape(batch.index.shape)
        return own, dataclasses.replace(batch, index=index)


def token_source(corpus: Corpus, mesh: Mesh) -> Source:
    """No cache: steps embed the tokens and run every layer."""
    return Source(place(corpus.tokens, replicated(mesh)), 0, "off")


def choose_mode(
    mode: str, layer: int, size: int, device_budget: float, host_budget: float, split: int = 1
) -> str:
    """Where `size` bytes of activations go, of which a device would hold a `split`th. `auto`: the device,
    else the host, else a file; a site at layer 0 has nothing below it. Budgets in bytes.

    Raises UserError when a mode that was asked for exceeds its budget.
    """
    if layer == 0 or mode == "off":
        return "off"
    budgets = {"device": device_budget * split, "host": host_budget, "disk": float("inf")}
    if mode == "auto":
        return next(m for m, budget in budgets.items() if size <= budget)
    if size > budgets[mode]:
        raise UserError(
            f"prefix_cache: {mode} needs {size / 2**30:.2f} GiB, the budget is "
            f"{budgets[mode] / 2**30:.2f} GiB; use prefix_cache=auto or a larger memory_budget"
        )
    return mode


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefix_pass(
    spec: ModelSpec, stop: int, weights: Weights, base: Overrides, tokens: jax.Array, rows: Rows
) -> jax.Array:
    """Token ids [B, T] of packed rows -> what enters layer `stop` [B, T, D]."""
    x = decoder.embed(spec, weights, base, tokens)
    return decoder.run_layers(spec, weights, base, x, rows, 0, stop)


def empty_values(mode: str, shape: tuple[int, int], dtype: Any, folder: Path | None = None) -> np.ndarray:
    """Room for a cache of activations [total, D], zeros; on disk: an unnamed file in `folder`."""
    if mode != "disk":
        return np.zeros(shape, dtype)
    # The file is unlinked while open: it can never be left behind.
    with tempfile.TemporaryFile(dir=folder) as f:
        return np.memmap(f, dtype, "w+", shape=shape)


def filled_source(values: np.ndarray, layer: int, mode: str, mesh: Mesh) -> Source:
    """What `empty_values` gave, with activations in it, where `mode` wants it."""
    there = mode == "device"
    return Source(place(values, source_sharding(mesh, values.shape)) if there else values, layer, mode)


def cached_source(
    spec: ModelSpec,
    weights: Weights,
    corpus: Corpus,
    layer: int,
    mode: str,
    mesh: Mesh,
    row_length: int,
    most_rows: int = 32,
    folder: Path | None = None,
    base: Overrides = {},  # noqa: B006 (never written to)
) -> Source:
    """Run every example once through the layers below `layer` and keep what comes out, in corpus
    order (zeros at the last tokens, which no batch reads). `mode` as `choose_mode` returned it; a disk
    cache is an unnamed file in `folder`; `base`: edits that the model already carries. With several
    processes each computes its share, and all get, and keep, all of it."""
    if mode == "off":
        return token_source(corpus, mesh)
    values = empty_values(mode, (len(corpus.tokens), spec.d_model), activation_dtype(weights), folder)
    for batch in _passes(corpus, mesh, row_length, most_rows):
        ids = place(corpus.tokens[batch.index], rows_sharding(mesh, len(batch.index)))
        out = fetch(prefix_pass(spec, layer, weights, base, ids, batch.rows))
        used = batch.rows.segments > 0
        values[batch.index[used]] = out[used]
    return filled_source(values, layer, mode, mesh)


def _passes(corpus: Corpus, mesh: Mesh, row_length: int, most_rows: int) -> Iterator[Batch]:
    """Every example once, in packed batches of one shape."""
    length, rows = even_rows(corpus, row_length, most_rows, mesh.shape["data"])
    for which in sequential_batches(corpus, rows, length):
        batch = pack(corpus, which, dataclasses.replace(fit_shape(corpus, [which], length), rows=rows))
        assert batch is not None, "sequential_batches keeps to the rows"
        yield batch


@functools.partial(jax.jit, static_argnums=0)
def layer_pass(
    spec: ModelSpec, weights: Weights, layer: jax.Array, source: jax.Array, index: jax.Array, rows: Rows
) -> jax.Array:
    """What enters `layer` (traced: one compilation serves all of them) -> what enters the next [B, T, D].
    `source` as in `Source`: token ids or activations, looked up by `index` [B, T]."""
    x = decoder.embed(spec, weights, {}, source[index]) if source.ndim == 1 else source[index]
    w = decoder.take_layer(weights, layer)
    return decoder.block(spec, w, x, rows, decoder.windows(spec)[layer])[0]


def advance(
    spec: ModelSpec,
    weights: Weights,
    corpus: Corpus,
    source: Source,
    mode: str,
    mesh: Mesh,
    row_length: int,
    most_rows: int = 32,
) -> Source:
    """The cache one layer higher, by one block for every example instead of all those below it. `source`
    is used up where it lies on the host or on disk (its array is written over)."""
    values = source.values
    if isinstance(values, jax.Array) or values.ndim == 1:
        values = empty_values(mode, (len(corpus.tokens), spec.d_model), activation_dtype(weights))
    layer = place(np.int32(source.layer), replicated(mesh))
    for batch in _passes(corpus, mesh, row_length, most_rows):
        array, fed = source.feed(batch)
        shardings = jax.tree.map(lambda a: rows_sharding(mesh, len(a)), (fed.index, fed.rows))
        index, rows = jax.tree.map(place, (fed.index, fed.rows), shardings)
        array = place(array, source_sharding(mesh, array.shape))
        out = layer_pass(spec, weights, layer, array, index, rows)
        used = batch.rows.segments > 0
        values[batch.index[used]] = fetch(out)[used]
    return filled_source(values, source.layer + 1, mode, mesh)

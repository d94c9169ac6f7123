"""io.hf_load."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from locft_jax.errors import UserError, is_panic
from locft_jax.io import reading
from locft_jax.io.hf_folder import HFFolder, open_folder, read_part, read_tensor
from locft_jax.model.model import Model
from locft_jax.model.quantize import Quantized, quantize_rows, row_scales
from locft_jax.model.sharding import fetch, make_mesh, weight_shardings
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Params, Row, Weights, locate_tensor, weight_table

BLOCK = 2**21  # elements that are quantized at once by a thread


def load_weights(
    checkpoint: HFFolder, mesh: Mesh | None = None, dtype: Any = None, int8: bool = False
) -> Weights:
    """Stream the checkpoint onto the mesh: {key: [L, out, in] or [out, in]}, sharded by the table.

    Each device's callback reads its own byte ranges; host memory beyond the arrays is one shard.
    `dtype` None keeps the checkpoint's; with `int8` matrices are a Quantized, the rest is in `dtype`.
    """
    mesh = make_mesh() if mesh is None else mesh
    dtype = np.dtype(checkpoint.dtype if dtype is None else dtype)

    def callback(row: Row, index: tuple[slice, ...]) -> np.ndarray:
        names, inner = (row.names()[index[0]], index[1:]) if row.layers else ([row.hf], index)
        sizes = tuple(len(range(*s.indices(n))) for s, n in zip(inner, row.shape, strict=True))
        out = reading.empty((len(names), *sizes), dtype)
        blocks = (
            job
            for name, part in zip(names, out, strict=True)
            for job in reading.jobs(checkpoint.place, checkpoint.tensors[name], inner, part)
        )
        for done in [pool.submit(job) for job in blocks]:
            done.result()
        return out if row.layers else out[0]

    weights: Weights = {}
    table = weight_table(checkpoint.spec)
    with ThreadPoolExecutor(reading.threads(checkpoint.place)) as pool:
        for key, place in weight_shardings(mesh, checkpoint.spec, int8).items():
            if isinstance(place, Quantized):
                weights[key] = _load_int8(checkpoint, table[key], place, pool)
            else:
                block = functools.partial(callback, table[key])
                weights[key] = jax.make_array_from_callback(table[key].stacked, place, block)
    return weights


def _load_int8(checkpoint: HFFolder, row: Row, place: Quantized, pool: ThreadPoolExecutor) -> Quantized:
    """A row of the table, quantized while it is read: host memory beyond one int8 shard is a few
    BLOCKs a thread.

    A scale is that of the whole row of the matrix, so a device that holds a part of the columns reads all
    of them, unless another has done so.
    """
    names, (height, width) = row.names(), row.shape
    scale = np.zeros((len(names), height), np.float32)  # 0: not known yet
    step = max(1, BLOCK // width)

    def values(index: Any) -> np.ndarray:
        rows, columns = index[-2:]
        some = range(height)[rows]
        layers = range(len(names))[index[0]] if row.layers else range(1)
        out = reading.empty((len(layers), len(some), len(range(width)[columns])), np.dtype(np.int8))

        def fill(i: int, start: int) -> None:
            own = some[start : start + step]
            part, of_rows = slice(own.start, own.stop), scale[layers[i], own.start : own.stop]
            if of_rows.all():
                block = read_part(checkpoint, names[layers[i]], (part, columns))
            else:
                block = read_part(checkpoint, names[layers[i]], (part, slice(None)))
                of_rows[:] = row_scales(block)
                block = block[:, columns]
            out[i, start : start + step] = quantize_rows(block, of_rows)

        blocks = itertools.product(range(len(layers)), range(0, len(some), step))
        list(pool.map(fill, *zip(*blocks, strict=True)))
        return out if row.layers else out[0]

    loaded = jax.make_array_from_callback(row.stacked, place.values, values)
    known = scale if row.layers else scale[0]
    return Quantized(loaded, jax.make_array_from_callback(known.shape, place.scale, known.__getitem__))


def load_tokenizer(checkpoint: HFFolder) -> Any:
    """The folder's fast tokenizer. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((checkpoint.path / n).exists() for n in names):
        raise UserError(f"{checkpoint.place}: no tokenizer (tokenizer.json) in this model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint.path), trust_remote_code=False, local_files_only=True
        )
        tokenizer("a")  # some settings are only looked at here
    except BaseException as e:  # any failure means unusable files
        if not (isinstance(e, Exception) or is_panic(e)):
            raise
        reason = " ".join(str(e).replace(str(checkpoint.path), str(checkpoint.place)).split())[:200]
        raise UserError(f"{checkpoint.place}: the tokenizer cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{checkpoint.place}: no fast tokenizer (tokenizer.json) in this model folder")
    return tokenizer


def load_model(path_or_id: str, weights: str = "checkpoint", mesh: Mapping[str, int] | None = None) -> Model:
    """Open, check and load a model folder or Hub id. `weights`: the frozen weights' dtype
    (`checkpoint`, `float32`, `bfloat16`, `int8`); `mesh`: {data, model} sizes.

    Raises UserError for anything that is wrong with the folder, before weights are read.
    """
    checkpoint = open_folder(path_or_id)
    tokenizer = load_tokenizer(checkpoint)
    return load_opened(checkpoint, tokenizer, make_mesh(mesh), weights)


def load_opened(checkpoint: HFFolder, tokenizer: Any, mesh: Mesh, weights: str = "checkpoint") -> Model:
    """The model of a checkpoint that has been opened and checked."""
    loaded = load_weights(checkpoint, mesh, frozen_dtype(checkpoint, weights), weights == "int8")
    check_finite(checkpoint, loaded)
    return Model(Params(checkpoint.spec, loaded), mesh, tokenizer, checkpoint)


def frozen_dtype(checkpoint: HFFolder, weights: str) -> np.dtype:
    """numpy dtype of the activations and frozen weights for the key `weights`; with `int8`, of the
    activations and norms."""
    given = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    return np.dtype(given.get(weights, checkpoint.dtype))


def check_finite(checkpoint: HFFolder, weights: Weights) -> None:
    """Raise UserError naming the tensors that hold NaN or infinity (one pass over the weights)."""
    finite = jax.tree.map(fetch, _finite(checkpoint.spec, weights))
    bad = [
        name
        for key, row in weight_table(checkpoint.spec).items()
        for name, good in zip(row.names(), np.atleast_1d(finite[key]), strict=True)
        if not good
    ]
    if bad:
        lines = "\n  ".join(bad[:15]) + (f"\n  ... and {len(bad) - 15} more" if len(bad) > 15 else "")
        raise UserError(
            f"{checkpoint.place}: NaN or infinity (as {weights['norm'].dtype}) in these tensors; "
            f"fetch or make the model again:\n  {lines}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _finite(spec: ModelSpec, weights: Weights) -> dict[str, jax.Array]:
    """Whether all elements of each tensor are finite: {key: [L] or scalar, bool}. NaN or infinity less itself
    is NaN, and a sum keeps it (a maximum does not: XLA's on CPUs loses NaN). On a CPU `isfinite` of every
    element would take seven times as long, and memory for as many bools."""
    finite = {}
    for key, row in weight_table(spec).items():
        # A scale is finite when its row is.
        a = weights[key].scale if isinstance(weights[key], Quantized) else weights[key]
        finite[key] = jnp.sum(a - a, axis=tuple(range(bool(row.layers), a.ndim)), dtype=jnp.float32) == 0
    return finite


def originals(model: Model, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Of those tensors (HF names) that the model holds as int8, the checkpoint's own values."""
    held = {n: model.weights[locate_tensor(model.spec, n)[0].key] for n in names if n not in model.overrides}
    return {n: read_tensor(model.folder, n) for n, w in held.items() if isinstance(w, Quantized)}

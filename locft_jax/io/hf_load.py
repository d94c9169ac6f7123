"""Loading: a model folder's weights streamed into sharded, layer-stacked arrays, its tokenizer, a Model.

Each device's callback reads the byte ranges that it needs straight from the safetensors files; nothing passes
through torch.
"""

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
from numpy.typing import DTypeLike

from locft_jax.errors import UserError, is_panic, refuse
from locft_jax.io import reading
from locft_jax.io.hf_folder import HFFolder, open_folder, read_part, read_tensor
from locft_jax.model.model import Model
from locft_jax.model.sharding import fetch, make_mesh, weight_shardings
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import (
    Params,
    Quantized,
    Row,
    Weights,
    locate_tensor,
    quantize_rows,
    row_scales,
    weight_table,
)

BLOCK = 2**21  # elements that are quantized at once by a thread


def load_weights(
    folder: HFFolder, mesh: Mesh | None = None, dtype: DTypeLike | None = None, int8: bool = False
) -> Weights:
    """Stream the weights onto the mesh: {key: [L, out, in] or [out, in]}, sharded by the table.

    Host memory beyond the arrays is one shard. `dtype` None keeps what is stored; with `int8` matrices are a
    Quantized, the rest is in `dtype`.
    """
    mesh = make_mesh() if mesh is None else mesh
    dtype = np.dtype(folder.dtype if dtype is None else dtype)

    def shard(row: Row, index: reading.Index) -> np.ndarray:
        names, inner = (row.names()[index[0]], index[1:]) if row.layers else ([row.hf], index)
        out = reading.empty((len(names), *reading.part_shape(inner, row.shape)), dtype)
        blocks = (
            job
            for name, part in zip(names, out, strict=True)
            for job in reading.jobs(folder.source, folder.tensors[name], inner, part)
        )
        for done in [pool.submit(job) for job in blocks]:
            done.result()
        return out if row.layers else out[0]

    weights: Weights = {}
    table = weight_table(folder.spec)
    with ThreadPoolExecutor(reading.threads(folder.source)) as pool:
        for key, sharding in weight_shardings(mesh, folder.spec, int8).items():
            if isinstance(sharding, Quantized):
                weights[key] = _load_int8(folder, table[key], sharding, pool)
            else:
                read = functools.partial(shard, table[key])
                weights[key] = jax.make_array_from_callback(table[key].stacked, sharding, read)
    return weights


def _load_int8(folder: HFFolder, row: Row, shardings: Quantized, pool: ThreadPoolExecutor) -> Quantized:
    """A row of the table, quantized while it is read: host memory beyond one int8 shard is a few BLOCKs per
    thread.

    A scale is that of the whole row of the matrix, so a device that holds a part of the columns reads all
    of them, unless another has done so.
    """
    names, (height, width) = row.names(), row.shape
    scale = np.zeros((len(names), height), np.float32)  # 0: not known yet
    step = max(1, BLOCK // width)

    def values(index: reading.Index | None) -> np.ndarray:
        assert index is not None  # of scalars only
        rows, columns = index[-2:]
        some = range(height)[rows]
        layers = range(len(names))[index[0]] if row.layers else range(1)
        out = reading.empty((len(layers), len(some), len(range(width)[columns])), np.dtype(np.int8))

        def fill(i: int, start: int) -> None:
            own = some[start : start + step]
            part, of_rows = slice(own.start, own.stop), scale[layers[i], own.start : own.stop]
            if of_rows.all():
                block = read_part(folder, names[layers[i]], (part, columns))
            else:
                block = read_part(folder, names[layers[i]], (part, slice(None)))
                of_rows[:] = row_scales(block)
                block = block[:, columns]
            out[i, start : start + step] = quantize_rows(block, of_rows)

        blocks = itertools.product(range(len(layers)), range(0, len(some), step))
        list(pool.map(fill, *zip(*blocks, strict=True)))
        return out if row.layers else out[0]

    loaded = jax.make_array_from_callback(row.stacked, shardings.values, values)
    known = scale if row.layers else scale[0]
    scales = jax.make_array_from_callback(known.shape, shardings.scale, lambda index: known[index])
    return Quantized(loaded, scales)


def load_tokenizer(folder: HFFolder) -> Any:
    """The folder's fast tokenizer. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    if not any((folder.path / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder.source}: no tokenizer (tokenizer.json) in this model folder")
    where = str(folder.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=True)
        tokenizer("a")  # some settings are only looked at here
    except BaseException as e:  # any failure means unusable files
        if not (isinstance(e, Exception) or is_panic(e)):
            raise
        reason = " ".join(str(e).replace(where, str(folder.source)).split())[:200]
        raise UserError(f"{folder.source}: the tokenizer cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder.source}: no fast tokenizer (tokenizer.json) in this model folder")
    return tokenizer


def load_model(path_or_id: str, weights: str = "checkpoint", mesh: Mapping[str, int] | None = None) -> Model:
    """Open, check and load a model folder, Hub id or URL. `weights`: the frozen weights' dtype (`checkpoint`,
    `float32`, `bfloat16`, `int8`); `mesh`: {data, model} sizes. Raises UserError for what is wrong."""
    folder = open_folder(path_or_id)
    return load_opened(folder, load_tokenizer(folder), make_mesh(mesh), weights)


def load_opened(folder: HFFolder, tokenizer: Any, mesh: Mesh, weights: str = "checkpoint") -> Model:
    """The model of a folder that has been opened and checked."""
    loaded = load_weights(folder, mesh, frozen_dtype(folder, weights), weights == "int8")
    check_finite(folder, loaded)
    return Model(Params(folder.spec, loaded), mesh, tokenizer, folder)


def frozen_dtype(folder: HFFolder, weights: str) -> np.dtype:
    """dtype of the activations and frozen weights for the key `weights`; with `int8`, of what is not int8."""
    given: dict[str, DTypeLike] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    return np.dtype(given.get(weights, folder.dtype))


def check_finite(folder: HFFolder, weights: Weights) -> None:
    """Raise UserError naming the tensors that hold NaN or infinity (one pass over the weights)."""
    finite = jax.tree.map(fetch, _finite(folder.spec, weights))
    names = {key: np.array(row.names()) for key, row in weight_table(folder.spec).items()}
    bad = [str(name) for key in names for name in names[key][~np.atleast_1d(finite[key])]]
    wrong = f"NaN or infinity (as {weights['norm'].dtype}) in these tensors"
    refuse(f"{folder.source}: {wrong}; fetch or make the model again", bad, most=15)


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
    """Of those tensors (HF names) that the model holds as int8, the folder's own values."""
    held = {n: model.weights[locate_tensor(model.spec, n)[0].key] for n in names if n not in model.overrides}
    return {n: read_tensor(model.folder, n) for n, w in held.items() if isinstance(w, Quantized)}

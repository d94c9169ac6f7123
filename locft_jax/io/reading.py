"""Parts of a checkpoint's tensors, read block by block into arrays that are there already.

What lies together in the file is read straight into the array, from a file here or by ranged requests from
a URL; columns and other dtypes go through one block at a time. So host memory beyond the arrays is a block
a thread, and nothing is mapped for longer than a block.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from locft_jax.io.remote import BLOCK, Remote
from locft_jax.io.safetensors_header import NUMPY, TensorInfo

ALIGNMENT = 64  # bytes: with it a CPU device takes over an array as it is
Job = Callable[[], None]


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of undefined values that a CPU device can hold without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


def threads(place: Path | Remote) -> int:
    """Blocks to read at a time: a disk is kept busy by two, an object store by many."""
    return 16 if isinstance(place, Remote) else min(4, os.cpu_count() or 1)


def jobs(place: Path | Remote, info: TensorInfo, index: tuple[slice, ...], out: np.ndarray) -> Iterator[Job]:
    """What fills `out` (of any dtype) with a tensor's part at `index`, as independent blocks. `place`: the
    folder of its file."""
    file, stored = place / info.file, np.dtype(NUMPY[info.dtype])
    index = index or (slice(None),) * len(info.shape)
    ranges = [range(*s.indices(n)) for s, n in zip(index, info.shape, strict=True)]
    rows, rest = (ranges[0] if ranges else range(1)), info.shape[1:]
    row = math.prod(rest) * stored.itemsize
    begin = info.begin + rows.start * row
    whole = all(len(r) == n for r, n in zip(ranges[1:], rest, strict=True))
    if whole and out.dtype == stored and out.flags.c_contiguous:
        raw = out.reshape(-1).view(np.uint8)
        for at in range(0, raw.size, BLOCK):
            yield functools.partial(fill, file, begin + at, raw[at : at + BLOCK])
        return
    step = max(1, BLOCK // max(1, row))
    for at in range(0, len(rows), step):
        count = min(step, len(rows) - at)
        target = out[at : at + count] if ranges else out
        shape = (count, *rest) if ranges else ()
        yield functools.partial(_convert, file, begin + at * row, shape, stored, index[1:], target)


def fill(file: Path | Remote, begin: int, raw: np.ndarray) -> None:
    """Bytes of a file into an array of them."""
    if isinstance(file, Remote):
        raw[:] = np.frombuffer(file.read(begin, begin + raw.size), np.uint8)
        return
    view = raw.data
    with open(file, "rb", buffering=0) as f:
        f.seek(begin)
        while view:
            count = f.readinto(view)
            if not count:
                raise OSError(f"{file}: it ends {len(view):,} bytes before its header says")
            view = view[count:]


def _convert(
    file: Path | Remote,
    begin: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    columns: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """Whole rows of a file, cut to their `columns`, into `out`."""
    out[...] = block(file, begin, shape, dtype)[(slice(None), *columns) if shape else ()]


def block(file: Path | Remote, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A view of a file's bytes as an array, read when it is used; of a file at a URL, a copy."""
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    if isinstance(file, Remote):
        size = math.prod(shape) * dtype.itemsize
        return np.frombuffer(file.read(begin, begin + size), dtype).reshape(shape)
    # The map is of bytes: numpy maps no ml_dtypes.
    size = math.prod(shape) * dtype.itemsize
    return np.memmap(file, np.uint8, "r", begin, (size,)).view(dtype).reshape(shape)

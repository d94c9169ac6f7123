"""Byte ranges of safetensors files, read block by block into arrays that are there already.

A contiguous part of a tensor is read straight into the array, from a local file or by ranged requests from a
URL; columns and other dtypes go through one block at a time. So host memory beyond the arrays is a block per
thread, and nothing is mapped for longer than a block.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from locft_jax.io.remote import BLOCK, THREADS, Remote
from locft_jax.io.safetensors_header import NUMPY, TensorInfo

ALIGNMENT = 64  # bytes: with it a CPU device takes over an array as it is
Job = Callable[[], None]
Index = tuple[slice, ...]  # one slice per dimension


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of undefined values that a CPU device can hold without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


def part_shape(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the part at `index` of an array of this shape."""
    return tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))


def threads(source: Path | Remote) -> int:
    """Blocks to read at a time: a disk is kept busy by a few, an object store by many."""
    return THREADS if isinstance(source, Remote) else min(4, os.cpu_count() or 1)


def jobs(source: Path | Remote, info: TensorInfo, index: Index, out: np.ndarray) -> Iterator[Job]:
    """What fills `out` (of any dtype) with a tensor's part at `index`, as independent blocks. `source`: the
    folder of its file."""
    file, stored = source / info.file, np.dtype(NUMPY[info.dtype])
    index = index or (slice(None),) * len(info.shape)
    rows = range(*index[0].indices(info.shape[0])) if info.shape else range(1)
    rest = info.shape[1:]
    row = math.prod(rest) * stored.itemsize
    begin = info.begin + rows.start * row
    if not out.size:
        return
    if part_shape(index[1:], rest) == rest and out.dtype == stored and out.flags.c_contiguous:
        raw = out.reshape(-1).view(np.uint8)
        for at in range(0, raw.size, BLOCK):
            yield functools.partial(fill, file, begin + at, raw[at : at + BLOCK])
        return
    step = max(1, BLOCK // max(1, row))
    for at in range(0, len(rows), step):
        count = min(step, len(rows) - at)
        target = out[at : at + count] if info.shape else out
        shape = (count, *rest) if info.shape else ()
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
    file: Path | Remote, begin: int, shape: tuple[int, ...], dtype: np.dtype, columns: Index, out: np.ndarray
) -> None:
    """Whole rows of a file, cut to their `columns`, into `out`; a local file is mapped, so that no other
    columns are read."""
    size = math.prod(shape) * dtype.itemsize
    if isinstance(file, Remote):
        raw = np.frombuffer(file.read(begin, begin + size), np.uint8)
    else:
        raw = np.memmap(file, np.uint8, "r", begin, (size,))  # of bytes: numpy maps no ml_dtypes
    rows = raw.view(dtype).reshape(shape)
    out[...] = rows[(slice(None), *columns)] if shape else rows

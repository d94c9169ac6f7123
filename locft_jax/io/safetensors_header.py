"""Headers of safetensors files, here and at URLs: where each tensor is. The library checks them."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from locft_jax.errors import UserError
from locft_jax.io.remote import Remote, naming_url

# Every dtype that numpy (with ml_dtypes' bfloat16) can hold and copy, and its bytes per element.
NUMPY: dict[str, DTypeLike] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64,
    "I64": np.int64, "F64": np.float64,
}  # fmt: skip
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}
LFS = b"version https://git-lfs"
LONGEST = 100_000_000  # bytes of a header; the library refuses longer ones too


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: file name, HF shape, safetensors dtype name, offset of its first byte."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int = 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file, by name; no tensor is read. Raises UserError for a file that is damaged."""
    try:
        with safe_open(path, "np"), open(path, "rb") as f:
            data = 8 + int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(data - 8))
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable safetensors file: {explain(path, e)}") from None
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(path.name, tuple(info["shape"]), info["dtype"], data + info["data_offsets"][0])
        for name, info in header.items()
    }


def read_remote_header(file: Remote, size: int) -> dict[str, TensorInfo]:
    """`read_header` of a file of `size` bytes at a URL, of which only the header is fetched: the library
    reads local files, so it gets one with this header and else a hole of the right size."""
    start = file.read(0, min(size, 2**20))
    end = min(size, 8 + LONGEST, 8 + int.from_bytes(start[:8], "little"))
    if end > len(start):
        start += file.read(len(start), end)
    with tempfile.TemporaryDirectory(prefix="locft-jax-") as folder:
        local = Path(folder) / file.name
        local.write_bytes(start[:max(8, end)])
        os.truncate(local, size)
        with naming_url(local, file):
            return read_header(local)


def explain(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read (in the library's words) and what to do."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(len(LFS))
    except OSError as e:
        return str(e.strerror or e)
    if start == LFS:
        return "it is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
    said = str(error).removeprefix("Error while deserializing header: ")[:200]
    return f"{said} ({size:,} bytes); the file is truncated or not safetensors, fetch it again"

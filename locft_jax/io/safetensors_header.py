"""Headers of safetensors files: read by the library, explained by us where it only says "invalid"."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from locft_jax.errors import UserError
from locft_jax.io.remote import Remote

# Every dtype that numpy (with ml_dtypes' bfloat16) can hold and copy, and its bytes an element.
NUMPY: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64,
    "I64": np.int64, "F64": np.float64,
}  # fmt: skip
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}
LFS = b"version https://git-lfs"
_LONGEST = 100_000_000  # bytes of a header; the library refuses longer ones too


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a checkpoint tensor lies: file name, HF shape, safetensors dtype name, its first byte there."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int = 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file, by name; none is read.

    Raises UserError saying what is wrong with a file that cannot be read.
    """
    try:
        with safe_open(path, "np") as f:
            names = set(f.keys())
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable safetensors file: {explain(path, e)}") from None
    return {n: i for n, i in _tensors(path.name, header, 8 + length).items() if n in names}


def read_remote_header(file: Remote, size: int) -> dict[str, TensorInfo]:
    """`read_header` of a file of `size` bytes at a URL: the library reads local files only."""
    start = file.read(0, min(size, 2**20))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 + length <= min(size, 8 + _LONGEST):
        start += file.read(len(start), 8 + length)
    wrong = _wrong(size, start[:8], start[8 : 8 + length])
    if wrong:
        raise UserError(f"{file}: not a readable safetensors file: {wrong}")
    return _tensors(file.url.rpartition("/")[2], json.loads(start[8 : 8 + length]), 8 + length)


def _tensors(file: str, header: dict[str, Any], data: int) -> dict[str, TensorInfo]:
    """The tensors of a header that is known to be valid; `data`: where it ends."""
    return {
        name: TensorInfo(file, tuple(info["shape"]), str(info["dtype"]), data + info["data_offsets"][0])
        for name, info in header.items()
        if name != "__metadata__"
    }


def explain(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read and what to do; the library's own words where this finds
    nothing."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            rest = f.read(min(int.from_bytes(start, "little"), _LONGEST))
    except OSError as e:
        return str(e.strerror or e)
    return _wrong(size, start, rest) or str(error)[:200]


def _wrong(size: int, start: bytes, rest: bytes) -> str:
    """What is wrong with a file of `size` bytes that begins with these 8 bytes and this header; "" if
    nothing is."""
    length = int.from_bytes(start, "little")
    if size == 0:
        return "it is empty (0 bytes); fetch it again"
    if (start + rest).startswith(LFS) or start == LFS[:8]:
        return "it is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
    if size < 8:
        return f"it has {size} bytes, too few for a header; fetch it again"
    if length > size - 8:
        return (
            f"its header should be {length:,} bytes long, but the file has {size:,} in all: "
            "truncated, or not safetensors; fetch it again"
        )
    try:
        header = json.loads(rest)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        return "its header is no JSON object; fetch it again"
    faults = _faults(header, size - 8 - length)
    if not faults:
        return ""
    more = f" (and {len(faults) - 1} more such tensors)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}; fetch it again"


def _faults(header: dict[str, Any], room: int) -> list[str]:
    """What is wrong with the places that a header gives its tensors in `room` bytes of data."""
    faults, places = [], []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        info = info if isinstance(info, dict) else {}
        place, shape = _whole_numbers(info.get("data_offsets")), _whole_numbers(info.get("shape"))
        if place is None or len(place) != 2 or shape is None:
            faults.append(f"tensor {name!r:.80} has no shape and two data_offsets")
            continue
        begin, end = place
        needed = math.prod(shape) * SIZES.get(str(info.get("dtype")), 0)
        if end > room or begin > end:
            short = ", the file is truncated" if begin <= end else ""
            where = f"{begin:,} to {end:,} of {room:,} bytes of data{short}"
            faults.append(f"tensor {name!r:.80} should lie at {where}")
        elif needed and needed != end - begin:
            faults.append(f"tensor {name!r:.80} has {end - begin:,} bytes, shape and dtype need {needed:,}")
        else:
            places.append((begin, end, name))
    places.sort()
    for (_, end, one), (begin, _, other) in zip(places, places[1:], strict=False):
        if begin < end:
            faults.append(f"tensors {one!r:.80} and {other!r:.80} overlap")
    used = max((end for _, end, _ in places), default=0)
    if not faults and used != room:
        faults.append(f"its tensors take {used:,} bytes, but {room:,} bytes of data follow the header")
    return faults


def _whole_numbers(values: Any) -> list[int] | None:
    short = isinstance(values, list) and len(values) < 16
    return values if short and all(type(v) is int and 0 <= v < 2**63 for v in values) else None

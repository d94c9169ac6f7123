"""Headers of safetensors files: read by the library, explained by us where it only says "invalid"."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from locft_jax.errors import UserError

# Bytes an element, for every dtype that numpy (with ml_dtypes' bfloat16) can hold and copy.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
LFS = b"version https://git-lfs"
_LONGEST = 100_000_000  # bytes of a header; the library refuses longer ones too


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{tensor name: (shape, dtype name)} of a file; no tensor is read.

    Raises UserError saying what is wrong with a file that cannot be read.
    """
    try:
        with safe_open(path, "np") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {n: (tuple(p.get_shape()), p.get_dtype()) for n, p in parts.items()}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable safetensors file: {explain(path, e)}") from None


def explain(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read and what to do; the library's own words where this finds
    nothing."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            rest = f.read(min(length, _LONGEST))
    except OSError as e:
        return str(e.strerror or e)
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
        return str(error)[:200]
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

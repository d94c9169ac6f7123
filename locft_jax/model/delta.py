"""Deltas: the edited tensors of a model, new and old, as one small safetensors file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from locft_jax.errors import UserError
from locft_jax.model.headers import SIZES, explain
from locft_jax.model.hf import DTYPES, Checkpoint, read_tensor

BASE = "base::"


@dataclasses.dataclass(frozen=True)
class Delta:
    """Edited tensors, new and old, in the checkpoint's dtype and HF layout."""

    new: dict[str, np.ndarray]
    base: dict[str, np.ndarray]
    metadata: dict[str, str]  # fingerprint, config, data hash, package version


def fingerprint(checkpoint: Checkpoint, base: Mapping[str, np.ndarray]) -> str:
    """sha256 over every tensor's name, dtype and shape, plus the bytes of the edited ones before the
    edit: a delta fits exactly the models with this fingerprint."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
    for name in sorted(base):
        digest.update(name.encode() + b"\n" + np.ascontiguousarray(base[name]).tobytes())
    return digest.hexdigest()


def make_delta(checkpoint: Checkpoint, new: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Delta:
    """The delta of edited tensors against the checkpoint's own bytes."""
    base = {name: read_tensor(checkpoint, name) for name in new}
    known = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    return Delta(dict(new), base, {"fingerprint": fingerprint(checkpoint, base), **known})


def save_delta(delta: Delta, path: Path) -> None:
    """Write `delta.safetensors`: NAME (new) and base::NAME (old) for every edited tensor.

    The same delta is the same bytes; the library's own writer orders the metadata at random.
    """
    tensors = {**delta.new, **{BASE + n: a for n, a in delta.base.items()}}
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(delta.metadata.items()))}
    begin = 0
    for name in sorted(tensors):
        value = tensors[name]
        end = begin + value.nbytes
        header[name] = {"dtype": codes[value.dtype], "shape": value.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            f.write(np.ascontiguousarray(tensors[name]).tobytes())


def load_delta(path: Path) -> Delta:
    """Read a delta. Raises UserError for a file that is missing, corrupt or no delta."""
    try:
        with safe_open(path, "np") as f:
            dtypes = {n: f.get_slice(n).get_dtype() for n in f.keys()}  # noqa: SIM118 (no mapping)
            foreign = [n for n, dtype in dtypes.items() if dtype not in SIZES]  # numpy lacks them
            tensors = {} if foreign else {n: f.get_tensor(n) for n in dtypes}
            metadata = f.metadata() or {}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable delta file: {explain(path, e)}") from None
    if foreign:
        raise UserError(f"{path}: {foreign[0]} is {dtypes[foreign[0]]}; it must be {', '.join(DTYPES)}")
    new = {n: a for n, a in tensors.items() if not n.startswith(BASE)}
    base = {n.removeprefix(BASE): a for n, a in tensors.items() if n.startswith(BASE)}
    if not new or set(new) != set(base) or "fingerprint" not in metadata:
        raise UserError(f"{path}: no delta of this program (each edited tensor needs its base:: twin)")
    for name, value in new.items():
        if (value.shape, value.dtype) != (base[name].shape, base[name].dtype):
            raise UserError(f"{path}: {name} and its base:: twin differ in shape or dtype")
        if value.dtype not in map(np.dtype, DTYPES.values()):
            raise UserError(f"{path}: {name} is {value.dtype}; it must be {', '.join(DTYPES)}")
        if not np.isfinite(value).all():
            raise UserError(f"{path}: NaN or infinity in {name}; make the delta again")
    return Delta(new, base, metadata)


def check_delta(checkpoint: Checkpoint, delta: Delta) -> None:
    """Raise UserError unless the delta was made on this checkpoint, naming what differs."""
    for name, base in delta.base.items():
        if name not in checkpoint.tensors:
            raise UserError(f"delta: the model at {checkpoint.folder} has no tensor {name}")
        own = read_tensor(checkpoint, name)
        if own.shape != base.shape or own.dtype != base.dtype or own.tobytes() != base.tobytes():
            raise UserError(f"delta: {name} of {checkpoint.folder} is not the one this delta was made on")
    if fingerprint(checkpoint, delta.base) != delta.metadata["fingerprint"]:
        raise UserError(f"delta: made on another model than {checkpoint.folder} (the fingerprints differ)")

"""Deltas: the edited tensors of a model, new and old, as one small safetensors file."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from locft_jax.errors import UserError, refuse
from locft_jax.io.hf_folder import DTYPES, HFFolder, Layout, read_tensor
from locft_jax.io.remote import local_copy
from locft_jax.io.safetensors_header import explain

BASE = "base::"
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Delta:
    """Edited tensors, new and old, in the checkpoint's dtype and HF layout."""

    new: dict[str, np.ndarray]
    base: dict[str, np.ndarray]
    # fingerprint; result (the edited model's); tensors (the layout of both); config, data, versions, cards
    metadata: dict[str, str]

    def layout(self) -> Layout | None:
        """Every tensor of the model it was made on; None in a delta of a version that did not list them."""
        text = self.metadata.get("tensors")
        return None if text is None else {n: (dtype, tuple(shape)) for n, dtype, shape in json.loads(text)}

    def cards(self) -> list[str]:
        """The model cards of the edits in it (model_card.py), first edit first; none in a delta of `diff`."""
        return list(json.loads(self.metadata.get("cards", "[]")))


def fingerprint(layout: Layout, base: Mapping[str, np.ndarray]) -> str:
    """sha256 over every tensor's name, dtype and shape, plus the bytes of the edited ones before the edit: a
    delta fits exactly the models with this fingerprint."""
    digest = hashlib.sha256()
    for name, (dtype, shape) in sorted(layout.items()):
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
    for name in sorted(base):
        digest.update(name.encode() + b"\n" + np.ascontiguousarray(base[name]).tobytes())
    return digest.hexdigest()


def make_delta(folder: HFFolder, new: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Delta:
    """The delta of edited tensors against the folder's own bytes."""
    return assemble(folder.layout, new, {name: read_tensor(folder, name) for name in new}, metadata)


def assemble(
    layout: Layout, new: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> Delta:
    """A delta whose metadata says which model it fits; values of `metadata` that are no text become JSON."""
    given = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    own = {
        "fingerprint": fingerprint(layout, base),
        "result": fingerprint(layout, new),
        "tensors": json.dumps([[name, *layout[name]] for name in sorted(layout)], separators=(",", ":")),
    }
    return Delta(dict(new), dict(base), {**own, **given})


def save_delta(delta: Delta, path: Path) -> None:
    """Write `delta.safetensors`: NAME (new) and base::NAME (old) for every edited tensor.

    The same delta is the same bytes; the library's own writer orders the metadata at random.
    """
    tensors = {**delta.new, **{BASE + n: a for n, a in delta.base.items()}}
    header: dict[str, Any] = {"__metadata__": dict(sorted(delta.metadata.items()))}
    begin = 0
    for name, value in sorted(tensors.items()):
        offsets = [begin, begin := begin + value.nbytes]
        header[name] = {"dtype": CODES[value.dtype], "shape": value.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            f.write(np.ascontiguousarray(tensors[name]).tobytes())


def load_delta(path: str | Path) -> Delta:
    """Read a delta, here or at a URL. Raises UserError for a file that is missing, corrupt or no delta: its
    tensors come in pairs, its metadata can be read, and the fingerprints are those of the tensors in it."""
    with local_copy(path) as local:
        return _load_delta(local)


def _load_delta(path: Path) -> Delta:
    try:
        with safe_open(path, "np") as f:
            dtypes = {n: f.get_slice(n).get_dtype() for n in f.keys()}  # noqa: SIM118 (no mapping)
            metadata = f.metadata() or {}
            tensors = {n: f.get_tensor(n) for n, dtype in dtypes.items() if dtype in DTYPES}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable delta file: {explain(path, e)}") from None
    new = {n for n in dtypes if not n.startswith(BASE)}
    base = {n.removeprefix(BASE) for n in dtypes if n.startswith(BASE)}
    if not new or new != base or "fingerprint" not in metadata or not all(n.isprintable() for n in new):
        raise UserError(f"{path}: no delta of this program (each edited tensor needs its base:: twin)")
    wrong = [f"{n} has dtype {d}" for n, d in sorted(dtypes.items()) if d not in DTYPES]
    refuse(f"{path}: a delta holds {', '.join(DTYPES)}", wrong)
    delta = Delta({n: tensors[n] for n in new}, {n: tensors[BASE + n] for n in new}, metadata)
    for name, value in delta.new.items():
        if (value.shape, value.dtype) != (delta.base[name].shape, delta.base[name].dtype):
            raise UserError(f"{path}: {name} and its base:: twin differ in shape or dtype")
    _check_metadata(path, delta)
    return delta


def _list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(v) is kind for v in value)


METADATA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tensors": (
        "a list of [name, dtype, shape]",
        lambda v: _list_of(list, v) and all(_list_of(str, [n, d]) and _list_of(int, s) for n, d, s in v),
    ),
    "edits": ("a whole number", lambda v: type(v) is int and v >= 0),
    "cards": ("a list of texts", lambda v: _list_of(str, v)),
    "config": ("an object", lambda v: isinstance(v, dict)),
    "versions": ("an object", lambda v: isinstance(v, dict)),
    "parents": ("a list of objects", lambda v: _list_of(dict, v)),
}


def _check_metadata(path: Path, delta: Delta) -> None:
    for key, (what, valid) in METADATA.items():
        try:
            value = json.loads(delta.metadata.get(key, "null"))
            json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
            fine = key not in delta.metadata or valid(value)
        except (ValueError, RecursionError):
            fine = False
        if not fine:
            raise UserError(f"{path}: its metadata `{key}` is not {what}; the file is damaged")
    layout = delta.layout()
    if layout is None:
        return
    wrong = any(layout.get(n) != (CODES[a.dtype], a.shape) for n, a in delta.base.items())
    if wrong or fingerprint(layout, delta.base) != delta.metadata["fingerprint"]:
        raise UserError(f"{path}: its fingerprint is not that of the base tensors in it; the file is damaged")
    if delta.metadata.get("result") not in (None, fingerprint(layout, delta.new)):
        raise UserError(f"{path}: the edited tensors are not those that were saved; the file is damaged")


def check_delta(folder: HFFolder, delta: Delta, *, edited: bool = False) -> None:
    """Raise UserError unless the delta was made on this model and its values are finite; with `edited`,
    unless this model is what the delta makes. The message lists what differs."""
    wanted, other = (delta.new, delta.base) if edited else (delta.base, delta.new)
    have, layout = folder.layout, delta.layout()
    if layout is None:  # only the edited tensors are known
        layout = {n: (CODES[a.dtype], a.shape) for n, a in wanted.items()}
        have = {n: of for n, of in have.items() if n in layout}
    wrong = differences(have, layout)
    for name in sorted(wanted):
        if have.get(name) == layout.get(name):
            own = read_tensor(folder, name).tobytes()
            if own == wanted[name].tobytes():
                continue
            known = "is as it was before the edit" if edited else "holds this delta's edit already"
            wrong.append(f"{name} {known if own == other[name].tobytes() else 'has other values'}")
    if not wrong and fingerprint(folder.layout, delta.base) != delta.metadata["fingerprint"]:
        wrong = ["the fingerprints differ, so some tensor that it does not edit has another shape or dtype"]
    relation = "this delta makes" if edited else "this delta was made on"
    refuse(f"delta: {folder.source} is not the model that {relation}", wrong)
    if not edited:
        wrong = [n for n, a in sorted(delta.new.items()) if not np.isfinite(a).all()]
        refuse("delta: the edited values are not all finite (NaN or infinity)", wrong)


def differences(have: Layout, wanted: Layout) -> list[str]:
    """What is wrong with a model's tensors, a line per tensor."""
    lines = []
    for name in sorted(have.keys() | wanted.keys()):
        if name not in have:
            lines.append(f"{name} is missing")
        elif name not in wanted:
            lines.append(f"{name} should not be there")
        elif have[name] != wanted[name]:
            (dtype, shape), (right, size) = have[name], wanted[name]
            lines.append(f"{name} is {dtype} {list(shape)}, not {right} {list(size)}")
    return lines

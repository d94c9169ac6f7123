"""Deltas: the edited tensors of a model, new and old, as one small safetensors file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from locft_jax.errors import UserError
from locft_jax.io.hf_folder import DTYPES, HFFolder, read_raw, read_tensor
from locft_jax.io.remote import local_copy
from locft_jax.io.safetensors_header import explain
from locft_jax.version import __version__

BASE = "base::"
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
SHOWN = 10  # lines of a message that lists what differs

Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> safetensors dtype, shape


@dataclasses.dataclass(frozen=True)
class Delta:
    """Edited tensors, new and old, in the checkpoint's dtype and HF layout."""

    new: dict[str, np.ndarray]
    base: dict[str, np.ndarray]
    # fingerprint; result (the edited model's); tensors (the layout of both); config, data, versions, cards
    metadata: dict[str, str]

    def layout(self) -> Layout | None:
        """Every tensor of the model it was made on; None in a delta of a version that did not say."""
        text = self.metadata.get("tensors")
        return None if text is None else {n: (dtype, tuple(shape)) for n, dtype, shape in json.loads(text)}

    def cards(self) -> list[str]:
        """The cards (card.py) of the edits in it, first edit first; none in a delta that `diff` made."""
        return json.loads(self.metadata.get("cards", "[]"))


def layout_of(checkpoint: HFFolder) -> Layout:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def fingerprint(checkpoint: HFFolder, base: Mapping[str, np.ndarray]) -> str:
    """sha256 over every tensor's name, dtype and shape, plus the bytes of the edited ones before the
    edit: a delta fits exactly the models with this fingerprint."""
    return _fingerprint(layout_of(checkpoint), base)


def _fingerprint(layout: Layout, base: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, (dtype, shape) in sorted(layout.items()):
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
    for name in sorted(base):
        digest.update(name.encode() + b"\n" + np.ascontiguousarray(base[name]).tobytes())
    return digest.hexdigest()


def make_delta(checkpoint: HFFolder, new: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Delta:
    """The delta of edited tensors against the checkpoint's own bytes."""
    base = {name: read_tensor(checkpoint, name) for name in new}
    return assemble(layout_of(checkpoint), new, base, metadata)


def assemble(
    layout: Layout, new: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> Delta:
    """A delta whose metadata says what it fits; values of `metadata` that are no text become JSON."""
    known = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in metadata.items()}
    tensors = [[name, *layout[name]] for name in sorted(layout)]
    own = {
        "fingerprint": _fingerprint(layout, base),
        "result": _fingerprint(layout, new),
        "tensors": json.dumps(tensors, separators=(",", ":")),
    }
    return Delta(dict(new), dict(base), {**own, **known})


def origin(how: str, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Metadata of a delta that was made of others: what they were, and how many edits in all."""
    parents: list[dict[str, Any]] = []
    for delta in deltas:
        known: dict[str, Any] = {k: v for k, v in delta.metadata.items() if k in ("made_by", "data_sha256")}
        parsed = {k: json.loads(v) for k, v in delta.metadata.items() if k in ("edits", "parents")}
        parents.append(known | parsed)
    if how == "merge":
        parents.sort(key=lambda p: json.dumps(p, sort_keys=True))
    made: dict[str, Any] = {
        "made_by": how,
        "versions": {"locft-jax": __version__, "numpy": np.__version__},
    }
    if cards := [card for delta in deltas for card in delta.cards()]:
        made["cards"] = sorted(cards) if how == "merge" else cards
    if parents:
        made["parents"] = parents
    if parents and all("edits" in p for p in parents):
        made["edits"] = sum(p["edits"] for p in parents)
    return made


def diff_delta(base: HFFolder, edited: HFFolder) -> Delta:
    """The delta that makes `edited` of `base`, read tensor by tensor.

    Raises UserError unless both have the same names, shapes and dtypes, and some tensor differs.
    """
    wrong = differences(layout_of(edited), layout_of(base))
    refuse(f"diff: the tensors of {edited.place} are not those of {base.place}", wrong)
    names = [n for n in sorted(base.tensors) if read_raw(base, n) != read_raw(edited, n)]
    if not names:
        raise UserError(f"diff: every tensor of {edited.place} has the bytes of {base.place}'s: no delta")
    wrong = [f"{n} has dtype {base.tensors[n].dtype}" for n in names if base.tensors[n].dtype not in DTYPES]
    refuse(f"diff: tensors that differ have dtypes other than {', '.join(DTYPES)}", wrong)
    return make_delta(base, {n: read_tensor(edited, n) for n in names}, origin("diff", []))


# ---------------------------------------------------------------- files


def save_delta(delta: Delta, path: Path) -> None:
    """Write `delta.safetensors`: NAME (new) and base::NAME (old) for every edited tensor.

    The same delta is the same bytes; the library's own writer orders the metadata at random.
    """
    tensors = {**delta.new, **{BASE + n: a for n, a in delta.base.items()}}
    header: dict[str, Any] = {"__metadata__": dict(sorted(delta.metadata.items()))}
    begin = 0
    for name in sorted(tensors):
        value = tensors[name]
        end = begin + value.nbytes
        header[name] = {"dtype": CODES[value.dtype], "shape": value.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            f.write(np.ascontiguousarray(tensors[name]).tobytes())


def load_delta(place: str | Path) -> Delta:
    """Read a delta, here or at a URL. Raises UserError for a file that is missing, corrupt or no delta: its
    tensors come in pairs, its metadata can be read, and the fingerprints are those of the tensors in it."""
    with local_copy(place) as path:
        return _load_delta(path)


def _load_delta(path: Path) -> Delta:
    try:
        with safe_open(path, "np") as f:
            names = list(f.keys())
            dtypes = {n: f.get_slice(n).get_dtype() for n in names}
            metadata = f.metadata() or {}
            tensors = {n: f.get_tensor(n) for n in names if dtypes[n] in DTYPES}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable delta file: {explain(path, e)}") from None
    new = {n for n in names if not n.startswith(BASE)}
    base = {n.removeprefix(BASE) for n in names if n.startswith(BASE)}
    if not new or new != base or "fingerprint" not in metadata or not all(n.isprintable() for n in new):
        raise UserError(f"{path}: no delta of this program (each edited tensor needs its base:: twin)")
    refuse(
        f"{path}: a delta holds {', '.join(DTYPES)}",
        [f"{n} has dtype {d}" for n, d in sorted(dtypes.items()) if d not in DTYPES],
    )
    delta = Delta({n: tensors[n] for n in new}, {n: tensors[BASE + n] for n in new}, metadata)
    for name, value in delta.new.items():
        if (value.shape, value.dtype) != (delta.base[name].shape, delta.base[name].dtype):
            raise UserError(f"{path}: {name} and its base:: twin differ in shape or dtype")
    _check_metadata(path, delta)
    return delta


def _check_metadata(path: Path, delta: Delta) -> None:
    def is_row(row: Any) -> bool:
        return (
            isinstance(row, list)
            and [type(v) for v in row] == [str, str, list]
            and all(type(n) is int and n >= 0 for n in row[2])
        )

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and value.encode(errors="replace").decode() == value

    wanted = {
        "tensors": ("a list of [name, dtype, shape]", lambda v: isinstance(v, list) and all(map(is_row, v))),
        "edits": ("a whole number", lambda v: type(v) is int and v >= 0),
        "cards": ("a list of texts", lambda v: isinstance(v, list) and all(map(is_text, v))),
        "config": ("an object", lambda v: isinstance(v, dict)),
        "versions": ("an object", lambda v: isinstance(v, dict)),
        "parents": ("a list of objects", lambda v: isinstance(v, list) and all(type(p) is dict for p in v)),
    }
    for key, (what, valid) in wanted.items():
        try:
            fine = key not in delta.metadata or valid(json.loads(delta.metadata[key]))
        except (ValueError, RecursionError):
            fine = False
        if not fine:
            raise UserError(f"{path}: its metadata `{key}` is not {what}; the file is damaged")
    layout = delta.layout()
    if layout is None:
        return
    own = {n: (CODES[a.dtype], a.shape) for n, a in delta.base.items()}
    if any(layout.get(n) != of for n, of in own.items()) or (
        _fingerprint(layout, delta.base) != delta.metadata["fingerprint"]
    ):
        raise UserError(f"{path}: its fingerprint is not that of the base tensors in it; the file is damaged")
    if delta.metadata.get("result") not in (None, _fingerprint(layout, delta.new)):
        raise UserError(f"{path}: the edited tensors are not those that were saved; the file is damaged")


# ---------------------------------------------------------------- does it fit?


def check_delta(checkpoint: HFFolder, delta: Delta, *, edited: bool = False) -> None:
    """Raise UserError unless the delta was made on this checkpoint and its values are finite; with
    `edited`, unless this checkpoint is what the delta makes. The message lists what differs."""
    wanted, other = (delta.new, delta.base) if edited else (delta.base, delta.new)
    have = layout_of(checkpoint)
    layout = delta.layout()
    if layout is None:  # only the edited tensors are known
        layout = {n: (CODES[a.dtype], a.shape) for n, a in wanted.items()}
        have = {n: of for n, of in have.items() if n in layout}
    wrong = differences(have, layout)
    for name in sorted(wanted):
        if have.get(name) == layout.get(name):
            own = read_raw(checkpoint, name)
            if own == wanted[name].tobytes():
                continue
            known = "is as it was before the edit" if edited else "holds this delta's edit already"
            wrong.append(f"{name} {known if own == other[name].tobytes() else 'has other values'}")
    if not wrong and fingerprint(checkpoint, delta.base) != delta.metadata["fingerprint"]:
        wrong = ["the fingerprints differ, so some tensor that it does not edit has another shape or dtype"]
    place = checkpoint.place
    refuse(
        f"delta: {place} is not the model that this delta makes"
        if edited
        else f"delta: {place} is not the model that this delta was made on",
        wrong,
    )
    if not edited:
        wrong = [n for n, a in sorted(delta.new.items()) if not np.isfinite(a).all()]
        refuse("delta: the edited values are not all finite (NaN or infinity)", wrong)


def differences(have: Layout, wanted: Layout) -> list[str]:
    """What is wrong with a model's tensors, a line a tensor."""
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


def refuse(head: str, wrong: Sequence[str]) -> None:
    """Raise UserError if anything is wrong: on one line, or a list that fits a screen."""
    if len(wrong) == 1:
        raise UserError(f"{head}: {wrong[0]}")
    if wrong:
        more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise UserError("\n  ".join([f"{head}:", *wrong[:SHOWN], *more]))

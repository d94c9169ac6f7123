"""Deltas made of folders and of other deltas (diff, merge, compose), and how much a delta changes."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from locft_jax import __version__
from locft_jax.errors import UserError, refuse
from locft_jax.io.delta import CODES, Delta, assemble, differences, make_delta
from locft_jax.io.hf_folder import DTYPES, HFFolder, Layout, read_tensor


def origin(how: str, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Metadata of a delta that was made of others: what they were, and how many edits in all."""
    made: dict[str, Any] = {"made_by": how, "versions": {"locft-jax": __version__, "numpy": np.__version__}}
    parents = [
        {k: v for k, v in delta.metadata.items() if k in ("made_by", "data_sha256")}
        | {k: json.loads(v) for k, v in delta.metadata.items() if k in ("edits", "parents")}
        for delta in deltas
    ]
    cards = [card for delta in deltas for card in delta.cards()]
    if how == "merge":
        parents.sort(key=lambda p: json.dumps(p, sort_keys=True))
        cards.sort()
    if cards:
        made["cards"] = cards
    if parents:
        made["parents"] = parents
    if parents and all("edits" in p for p in parents):
        made["edits"] = sum(p["edits"] for p in parents)
    return made


def diff_delta(base: HFFolder, edited: HFFolder) -> Delta:
    """The delta that makes `edited` of `base`, read tensor by tensor.

    Raises UserError unless both have the same names, shapes and dtypes, and some tensor differs.
    """
    wrong = differences(edited.layout, base.layout)
    refuse(f"diff: the tensors of {edited.source} are not those of {base.source}", wrong)
    names = [n for n in sorted(base.tensors) if not _same(read_tensor(base, n), read_tensor(edited, n))]
    if not names:
        raise UserError(f"diff: every tensor of {edited.source} has the bytes of {base.source}'s: no delta")
    wrong = [f"{n} has dtype {base.tensors[n].dtype}" for n in names if base.tensors[n].dtype not in DTYPES]
    refuse(f"diff: tensors that differ have dtypes other than {', '.join(DTYPES)}", wrong)
    return make_delta(base, {n: read_tensor(edited, n) for n in names}, origin("diff", []))


def merge_deltas(deltas: Sequence[Delta]) -> tuple[Delta, list[str]]:
    """One delta that does what all of `deltas`, made on one base, do; and the tensors that several of them
    edit. Those become base + (A - base) + (B - base) ..., in float32, rounded to the tensor's dtype: a sum,
    so measure whether both edits survive it. The order of `deltas` changes no byte.

    Raises UserError for deltas of different bases, and for a sum beyond the dtype's range.
    """
    first = _layout(deltas[0], 1)
    base: dict[str, np.ndarray] = {}
    for number, delta in enumerate(deltas, 1):
        wrong = differences(_layout(delta, number), first)
        known = sorted(delta.base.keys() & base.keys())
        wrong += [f"{n} had other values" for n in known if not _same(base[n], delta.base[n])]
        refuse(f"merge: delta {number} was made on another base than the one(s) before it", wrong)
        base.update(delta.base)
    new, shared = {}, []
    for name in sorted(base):
        values = [d.new[name] for d in deltas if name in d.new]
        if len(values) > 1:
            shared.append(name)
        new[name] = values[0] if len(values) == 1 else _sum(base[name], values)
        if not np.isfinite(new[name]).all():
            raise UserError(f"merge: {name} would hold NaN or infinity")
    return assemble(first, new, base, origin("merge", deltas)), shared


def _sum(base: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    """base + (A - base) + (B - base) ..., added in an order that the values alone decide."""
    wide = base.astype(np.float32)
    change = np.zeros_like(wide)
    for value in sorted(values, key=lambda a: a.tobytes()):
        change += value.astype(np.float32) - wide
    with np.errstate(over="ignore"):  # looked for by the caller
        return (wide + change).astype(base.dtype)


def compose_deltas(first: Delta, second: Delta) -> Delta:
    """One delta against the base of `first` that does what `first` and then `second`, made on the model
    edited by `first`, do. Raises UserError if the base of `second` is not that model."""
    layout = _layout(first, 1)
    wrong = differences(_layout(second, 2), layout)
    for name in sorted(first.new.keys() & second.base.keys()):
        if not _same(second.base[name], first.new[name]):
            of_base = _same(second.base[name], first.base[name])
            wrong.append(f"{name} was " + ("the first one's base (see merge)" if of_base else "another"))
    refuse("compose: the second delta was not made on the model that the first one makes", wrong)
    new, base = {**first.new, **second.new}, {**second.base, **first.base}
    return assemble(layout, new, base, origin("compose", [first, second]))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _layout(delta: Delta, number: int) -> Layout:
    layout = delta.layout()
    if layout is None:
        raise UserError(
            f"delta {number}: made by a version that did not list the model's tensors; "
            "apply it, then make it anew with `diff BASE EDITED --out DELTA`"
        )
    return layout


@dataclasses.dataclass(frozen=True)
class Change:
    """What a delta does to one tensor. Norms are Frobenius norms."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float  # of new - old
    base_norm: float  # of old
    largest: float  # absolute change of one entry
    rank: int | None  # of new - old; None for what is no matrix, or not finite


def changes(delta: Delta) -> Iterator[Change]:
    """How much each tensor changes, by name, in float32 (norms summed in float64)."""
    for name in sorted(delta.new):
        new, base = delta.new[name].astype(np.float32), delta.base[name].astype(np.float32)
        with np.errstate(all="ignore"):
            change = new - base
            norms = [float(np.sqrt(np.square(a, dtype=np.float64).sum())) for a in (change, base, new)]
            largest = float(np.abs(change).max(initial=0))
        rank = None
        if change.ndim == 2 and np.isfinite(change).all():
            eps = float(ml_dtypes.finfo(delta.new[name].dtype).eps)  # type: ignore[no-untyped-call]
            rank = _rank(change, norms[2], eps)
        dtype = CODES[delta.new[name].dtype]
        yield Change(name, dtype, change.shape, norms[0], norms[1], largest, rank)


def _rank(change: np.ndarray, norm: float, eps: float) -> int:
    """Singular values of a change [M, N] that stand out of the rounding of the matrix, of Frobenius norm
    `norm`, that was stored with the relative spacing `eps`.

    Rounding moves entries by eps / 2 of their size at most; noise of that deviation s has singular values
    up to about s (sqrt(M) + sqrt(N)).
    """
    wide = change if change.shape[0] <= change.shape[1] else change.T
    rows, columns = wide.shape
    gram = np.zeros((rows, rows))
    for start in range(0, columns, 4096):
        block = wide[:, start : start + 4096].astype(np.float64)
        gram += block @ block.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    noise = eps / 2 * norm / np.sqrt(max(1, change.size)) * (np.sqrt(rows) + np.sqrt(columns))
    exact = values.max(initial=0) * np.sqrt(rows * np.finfo(np.float64).eps)  # of these singular values
    return int((values > max(noise, exact)).sum())

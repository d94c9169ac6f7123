"""Undo, combine and inspect edits. A delta (`delta.safetensors` of a run) holds the edited tensors, new and
old, and fits one base model."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from locft_jax.cli.main import new_parser
from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.io import outputs
from locft_jax.io.delta import Delta, check_delta, load_delta, save_delta
from locft_jax.io.delta_ops import Change, changes, compose_deltas, diff_delta, merge_deltas
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_save import save_hf
from locft_jax.io.model_card import readme
from locft_jax.io.remote import open_path, path_or_url, size_of
from locft_jax.logs import Bar, log

ROWS = 20  # tensors that `show` lists: a screen


def main(argv: list[str] | None = None) -> None:
    """Look at everything that can be wrong, then write one file or folder, whole or not at all."""
    args = parse(argv)
    args.run(args)


def apply(args: argparse.Namespace, edited: bool = False) -> None:
    """Make the edited model of the base: the bytes of the run's hf/."""
    delta = load_delta(args.delta)
    checkpoint = open_folder(args.model)
    outputs.check_model_out(args.out, args.overwrite, checkpoint.source)
    check_delta(checkpoint, delta, edited=edited)
    values = delta.base if edited else delta.new
    cards = readme(checkpoint.path, delta.cards(), revert=edited)
    save_hf(checkpoint, values, open_path(args.out), cards)
    files, touched = ({checkpoint.tensors[n].file for n in names} for names in (checkpoint.tensors, values))
    where = f"in {len(touched)} of {len(files)} weight file(s)"
    print(f"written to {args.out}/: {len(values)} tensor(s) rewritten, {where}")


def revert(args: argparse.Namespace) -> None:
    """Make the base, byte for byte, of the edited model."""
    apply(args, edited=True)


def diff(args: argparse.Namespace) -> None:
    """The delta between two folders of one model."""
    outputs.check_file(args.out, args.overwrite)
    _write(args.out, diff_delta(open_folder(args.base), open_folder(args.edited)))


def merge(args: argparse.Namespace) -> None:
    """One delta of several that were made on one base."""
    outputs.check_file(args.out, args.overwrite)
    delta, shared = merge_deltas([load_delta(path) for path in args.deltas])
    _write(args.out, delta)
    if shared:
        names = ", ".join(shared[:3]) + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")
        wrong = f"several of these deltas edit {names}: their changes were added up, which may blur both"
        log.warning(f"{wrong}; measure the result with `locft evaluate`")


def compose(args: argparse.Namespace) -> None:
    """One delta of two, the second made on the model that the first makes."""
    outputs.check_file(args.out, args.overwrite)
    _write(args.out, compose_deltas(load_delta(args.first), load_delta(args.second)))


def _write(out: str | Path, delta: Delta) -> None:
    with outputs.result_file(out) as part:
        save_delta(delta, part)
    print(f"written to {out}: {len(delta.new)} tensor(s), {size_of(out):,} bytes")


def show(args: argparse.Namespace) -> None:
    """What deltas edit, and by how much."""
    console = Console(markup=False, emoji=False, highlight=False)
    deltas = [load_delta(path) for path in args.deltas]
    for path, delta in zip(args.deltas, deltas, strict=True):
        lines = []
        with Bar("measuring", len(delta.new)) as bar:
            for change in changes(delta):
                lines.append(change)
                bar.advance(1, change.name)
        console.print(_table(f"{path}, {size_of(path):,} bytes", lines))
        for key, value in _known(delta.metadata):
            console.print(plain(f"{key:<11} {value}"), soft_wrap=True)


def _table(title: str, lines: list[Change]) -> Table:
    """A row a tensor; norms are Frobenius norms."""
    table = Table(title=plain(title), title_justify="left", show_footer=len(lines) > 1)
    total, base = (float(np.hypot.reduce([getattr(c, k) for c in lines])) for k in ("norm", "base_norm"))
    left = f"{len(lines) - ROWS} more; " if len(lines) > ROWS else ""
    table.add_column("tensor", f"{left}all {len(lines)}", overflow="fold")
    table.add_column("shape", overflow="fold")
    largest = max(c.largest for c in lines)
    feet = {"change": f"{total:.3g}", "of base": _share(total, base), "largest": f"{largest:.3g}", "rank": ""}
    for name, footer in feet.items():
        table.add_column(name, footer, justify="right")
    for c in lines[:ROWS]:
        shape, rank = f"{c.dtype} " + "x".join(map(str, c.shape)), "-" if c.rank is None else str(c.rank)
        share = _share(c.norm, c.base_norm)
        table.add_row(plain(c.name), shape, f"{c.norm:.3g}", share, f"{c.largest:.3g}", rank)
    return table


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def _known(metadata: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Lines about where a delta comes from."""
    yield "fingerprint", metadata["fingerprint"]
    for key, label in (("made_by", "made by"), ("edits", "edits"), ("data_sha256", "data sha256")):
        if key in metadata:
            yield label, metadata[key]
    for parent in json.loads(metadata.get("parents", "[]")):
        known = (f"{k} {parent[k]}" for k in ("made_by", "edits", "data_sha256") if k in parent)
        yield "made of", ", ".join(known)
    if "versions" in metadata:
        versions = json.loads(metadata["versions"])
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `run` is the function of the chosen action."""
    parser = new_parser("delta", __doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(run: Any, out: str, *words: str, **options: Any) -> argparse.ArgumentParser:
        own = actions.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        own.set_defaults(run=run)
        if out:
            own.add_argument("--out", type=path_or_url, required=True, metavar=out, help="what to write")
            own.add_argument("--overwrite", action="store_true", help="replace an existing --out when done")
        for word in words:
            own.add_argument(word, **dict({"metavar": word.upper(), "type": path_or_url}, **options))
        return own

    for run, what in ((apply, "base model: folder or Hub id"), (revert, "edited model: folder or Hub id")):
        action(run, "DIR", "delta").add_argument("--model", required=True, help=what)
    for run, out in ((show, ""), (merge, "DELTA")):
        action(run, out, "deltas", nargs="+", metavar="DELTA")
    action(diff, "DELTA", "base", "edited", type=str, help="folder or Hub id")
    action(compose, "DELTA", "first", "second")
    args = parser.parse_args(argv)
    if args.run is merge and len(args.deltas) < 2:
        raise UserError("merge: give two deltas or more")
    return args


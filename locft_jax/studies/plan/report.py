"""What a plan says: a table for people, a record for programs."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from locft_jax.evaluation.report import plain
from locft_jax.studies.plan.case import Case
from locft_jax.studies.plan.fit import Outcome, as_record
from locft_jax.studies.plan.topology import GIB


def as_report(
    case: Case, outcome: Outcome | None, other: Outcome | None, notes: Sequence[str]
) -> dict[str, Any]:
    """The whole plan for `--json`; `other`: the smallest topology that fits, None where none does."""
    return {
        "model": case.config.model_name_or_path,
        "weights": "int8" if case.int8 else str(case.dtype),
        "site": list(case.site),
        "edits": case.edits,
        "batch_size": case.config.batch_size,
        "row_length": case.config.row_length,
        "tokens_an_edit": float(case.corpus.lengths.mean()),
        "notes": list(notes),
        "plan": None if outcome is None else as_record(outcome),
        "smallest_that_fits": None if other is None else as_record(other),
        "versions": {name: _version(name) for name in ("locft-jax", "jax", "jaxlib", "libtpu")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def print_plan(case: Case, outcome: Outcome | None, other: Outcome | None, console: Console) -> None:
    """The table of `outcome`, and whether it fits, else where it would."""
    if outcome is None:
        return console.print("does not fit: no TPU slice known here is large enough")
    topology = outcome.topology
    dtype = "int8" if case.int8 else str(case.dtype)
    axes = f"data {outcome.mesh['data']} x model {outcome.mesh['model']}"
    console.print(
        plain(
            f"{case.config.model_name_or_path}: {dtype} weights, {case.edits:,} edits, {len(case.site)} "
            f"tensor(s) from {case.site[0]} on, batch {case.config.batch_size} in rows of "
            f"{case.config.row_length}"
        )
    )
    machine = f"{topology.count} chip(s)" + (" of one host" if topology.one_host else "")
    console.print(f"{topology.name}: {machine} of {topology.memory / GIB:.4g} GiB, mesh {axes}")
    console.print(_memory(outcome))
    if outcome.usages:
        console.print(_work(outcome))
    console.print(verdict(outcome, other))


def verdict(outcome: Outcome, other: Outcome | None) -> str:
    """The last line."""
    if outcome.fits:
        left = (outcome.topology.memory - outcome.total) / GIB
        sure = "" if outcome.usages else " by arithmetic"
        return f"fits{sure}: {outcome.total / GIB:.2f} GiB a chip, {left:.2f} GiB to spare"
    if other is None:
        return "does not fit, nor any larger topology of this kind that is known here"
    axes = f"mesh={{data: {other.mesh['data']}, model: {other.mesh['model']}}}"
    sure = "" if other.usages else " by arithmetic"
    return f"does not fit: smallest topology that does{sure}: {other.topology.name} with {axes}"


def _memory(outcome: Outcome) -> Table:
    title = "GiB a chip" if outcome.usages else "GiB a chip, by arithmetic"
    table = Table(title=title, title_justify="left")
    columns = ("program", "weights", "tuned", "caches", "temporaries", "total", "headroom")
    for name in columns:
        table.add_column(name, justify="left" if name == "program" else "right")
    memory = outcome.topology.memory

    def add(name: str, *sizes: float | None) -> None:
        table.add_row(name, *("-" if s is None else f"{s / GIB:.2f}" for s in sizes))

    for u in outcome.usages:
        add(
            u.program.name,
            u.program.weights,
            u.program.tuned,
            u.held,
            u.temporaries,
            u.total,
            memory - u.total,
        )
    if not outcome.usages:
        need = outcome.need
        add(
            "train step",
            need.weights,
            need.tuned,
            None,
            need.step,
            outcome.total,
            memory - outcome.total,
        )
    return table


def _work(outcome: Outcome) -> Table:
    table = Table(title="one call, by arithmetic", title_justify="left")
    for name in ("program", "TFLOP", "GiB sent", "at least", "limited by", "compiled"):
        table.add_column(name, justify="left" if name in ("program", "limited by") else "right")
    for u in outcome.usages:
        work, bound = u.program.work, u.program.work.bound(outcome.topology.chip, outcome.topology.count)
        least, limit = ("-", "-") if bound is None else (f"{1000 * bound[0]:.1f} ms", bound[1])
        row = (f"{work.flops / 1e12:.1f}", f"{work.sent / GIB:.3f}", least, limit, f"{u.seconds:.0f} s")
        table.add_row(u.program.name, *row)
    return table

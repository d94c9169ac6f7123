"""What a plan says: tables for people, a record for programs."""

from collections.abc import Sequence
from importlib.metadata import distributions
from typing import Any

from rich.console import Console

from locft_jax.evaluation.report import plain
from locft_jax.studies.plan.case import Case
from locft_jax.studies.plan.fit import Outcome, Usage
from locft_jax.studies.plan.topology import GIB
from locft_jax.studies.tables import print_table


def as_report(
    case: Case, outcome: Outcome | None, other: Outcome | None, notes: Sequence[str]
) -> dict[str, Any]:
    """The whole plan for `--json`; `other`: the smallest topology that fits, None where none does."""
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "model": case.config.model_name_or_path,
        "weights": "int8" if case.int8 else str(case.dtype),
        "site": list(case.site),
        "edits": case.edits,
        "batch_size": case.config.batch_size,
        "row_length": case.config.row_length,
        "tokens_an_edit": float(case.corpus.lengths.mean()),
        "notes": list(notes),
        "plan": None if outcome is None else _outcome_record(outcome),
        "smallest_that_fits": None if other is None else _outcome_record(other),
        "versions": {name: installed.get(name) for name in ("locft-jax", "jax", "jaxlib", "libtpu")},
    }


def _gib(size: float | None) -> float | None:
    return None if size is None else round(size / GIB, 3)


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    """Sizes in GiB a chip, times in seconds."""
    topology = outcome.topology
    return {
        "topology": topology.name,
        "chips": topology.count,
        "one_host": topology.one_host,
        "mesh": outcome.mesh,
        "chip_memory": _gib(topology.memory),
        "arithmetic": {k: _gib(getattr(outcome.need, k)) for k in ("weights", "tuned", "step")},
        "programs": [
            {
                "program": u.program.name,
                **{k: _gib(size) for k, size in _sizes(outcome, u).items()},
                "flops": u.flops,
                "seconds_at_least": u.at_least(topology),
                "compile_seconds": round(u.seconds, 1),
            }
            for u in outcome.usages
        ],
        "total": _gib(outcome.total),
        "fits": outcome.fits,
    }


def _sizes(outcome: Outcome, usage: Usage | None) -> dict[str, float | None]:
    """Bytes a chip of one program; of `None` those of the training step by arithmetic."""
    need, memory = outcome.need, outcome.topology.memory
    if usage is None:
        own = {"weights": need.weights, "tuned": need.tuned, "held": None, "temporaries": need.step}
        return {**own, "total": outcome.total, "headroom": memory - outcome.total}
    own = {"weights": usage.program.weights, "tuned": usage.program.tuned, "held": usage.held}
    return {**own, "temporaries": usage.temporaries, "total": usage.total, "headroom": memory - usage.total}


def print_plan(case: Case, outcome: Outcome | None, other: Outcome | None, console: Console) -> None:
    """The tables of `outcome`, and whether it fits, else where it would."""
    if outcome is None:
        return console.print("does not fit: no TPU slice known here is large enough")
    topology, config, mesh = outcome.topology, case.config, outcome.mesh
    dtype = "int8" if case.int8 else str(case.dtype)
    about = f"{config.model_name_or_path}: {dtype} weights, {case.edits:,} edits, {len(case.site)} tensor(s) "
    about += f"from {case.site[0]} on, batch {config.batch_size} in rows of {config.row_length}"
    console.print(plain(about))
    chips = f"{topology.count} chip(s)" + (" of one host" if topology.one_host else "")
    where = f"{topology.name}: {chips} of {topology.memory / GIB:.4g} GiB, mesh data {mesh['data']} x model "
    console.print(where + str(mesh["model"]))
    text = lambda size: "-" if size is None else f"{size / GIB:.2f}"  # noqa: E731
    rows = []
    for u in outcome.usages or (None,):
        sizes = {key: text(size) for key, size in _sizes(outcome, u).items()}
        rows.append({"program": u.program.name if u else "train step", **sizes})
    print_table("GiB a chip" if outcome.usages else "GiB a chip, by arithmetic", rows, console)
    calls = []
    for u in outcome.usages:
        least = f"{1000 * (u.at_least(topology) or 0):.1f} ms"  # with every chip at its peak rate
        work = {"program": u.program.name, "TFLOP": f"{u.flops / 1e12:.1f}", "at least": least}
        calls.append({**work, "compiled": f"{u.seconds:.0f} s"})
    if calls:
        print_table("one call", calls, console)
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

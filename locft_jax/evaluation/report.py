"""The report for people: what stands on the terminal when a run ends."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from locft_jax.errors import printable

ROWS = (
    ("reliability", "the edited prompts give the new answer"),
    ("generalization", "so do other phrasings of them"),
    ("locality", "other facts are answered right"),
    ("locality_agreement", "other answers did not change"),
    ("portability", "what follows from an edit is answered right"),
    ("capability", "skills that no edit is about"),
)


def plain(value: object) -> Text:
    """What a user or a model wrote, shown as it is: no mark-up, no control characters."""
    return Text(printable(value).replace("\n", " "))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def print_report(
    report: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """Before/after table, a few answers, and the counts a reader should know of."""
    table = Table(title=plain(f"{report['edits']} edits in {report['model']}"), title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("meaning", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, meaning in ROWS:
        values = report["before"].get(key), report["after"].get(key)
        if values != (None, None):
            table.add_row(key, _percent(values[0]), _percent(values[1]), meaning)
    if table.row_count:
        console.print(table)
    answers = _examples(predictions)
    if answers:
        shown = Table(title="some answers", title_justify="left")
        for column in ("probe", "prompt", "before", "after", "expected"):
            shown.add_column(column, overflow="fold", no_wrap=column == "probe")
        for line in answers:
            shown.add_row(*(plain(line[k] or "") for k in ("probe", "prompt", "before", "after", "target")))
        console.print(shown)
    rounds = "mini-batches" if report.get("pipeline") == "depth" else "epochs"
    console.print(
        f"{report['epochs_run']} {rounds}, {report['steps_run']} steps, stopped by {report['stopped']}; "
        f"{report['seconds']['edit']:.1f} s for the edit, {report['seconds_per_edit']:.4f} s an edit; "
        f"{report['site']['parameters']:,} parameters tuned in {len(report['site']['tensors'])} tensor(s)"
    )
    for key, text in (
        ("duplicates", "exact duplicates dropped"),
        ("conflicts", "prompts with several targets: not all of their edits can hold"),
        ("unreachable_targets", "targets that the stop rule cuts short: they can never count as right"),
        ("boundary_merges", "prompts whose end would merge with the target's first token"),
    ):
        if report.get(key):
            console.print(f"note: {report[key]} {text}")
        if key == "conflicts":
            _print_conflicts(report.get("conflicting_prompts", []), console)


def _print_conflicts(conflicts: Sequence[Mapping[str, Any]], console: Console, most: int = 5) -> None:
    """A line for each of the first few prompts with several targets."""
    short = lambda text: text if len(text) <= 60 else text[:60] + "..."  # noqa: E731
    for conflict in conflicts[:most]:
        targets = ", ".join(map(short, conflict["targets"][:3]))
        more = ", ..." if len(conflict["targets"]) > 3 else ""
        console.print(plain(f"  {short(conflict['prompt'])} -> {targets}{more}"))
    if len(conflicts) > most:
        console.print(f"  ... and {len(conflicts) - most} more: conflicting_prompts in report.json")


def _examples(predictions: Sequence[Mapping[str, Any]], each: int = 2) -> list[Mapping[str, Any]]:
    """The first few answers of every kind of probe."""
    seen: dict[str, int] = {}
    chosen = []
    for line in predictions:
        seen[line["probe"]] = seen.get(line["probe"], 0) + 1
        if seen[line["probe"]] <= each:
            chosen.append(line)
    return chosen

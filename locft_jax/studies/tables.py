"""Measured lines: kept one by one while a study runs; tables of them as JSON and CSV files, as rows on a
terminal; figures (rates 0-1, None where not measured) as text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from locft_jax import distributed
from locft_jax.editing.checkpointer import remove_unless_saved, resumable
from locft_jax.evaluation.report import plain
from locft_jax.io.atomic import append_jsonl, kept_jsonl, write_json
from locft_jax.io.outputs import saved_something

FIGURES = ("reliability", "generalization", "locality", "locality_agreement", "capability")
# Of a sweep's runs also the reliability where nothing but EOS ends an answer: what `append_eos` is for.
RATES = (FIGURES[0], "reliability_eos_only", *FIGURES[1:])
SHORT = dict(zip(RATES, ("rel.", "eos", "gen.", "loc.", "agr.", "cap."), strict=True))

Line = Mapping[str, Any]


class Lines(list[Line]):
    """The lines measured so far, in memory and in a file of checkpoint/, beside run.json: what the run is."""

    def __init__(self, file: Path) -> None:
        """With what an interrupted run has left in the file. The end of the last round of checks."""
        self.file = file
        distributed.agree(last=True)
        super().__init__(distributed.from_first(kept_jsonl(file) if distributed.first() else []))

    def keep(self, line: Line) -> Line:
        """One more line; on the disk when this returns."""
        self.append(line)
        if distributed.first():
            append_jsonl(self.file, line)
        return line

    @contextmanager
    def resumable(self, what: str) -> Iterator[None]:
        """Around a run: SIGTERM and Ctrl-C say how to resume; a run that has saved nothing leaves nothing.
        `what`: what the lines are."""
        folder = self.file.parent
        try:
            with resumable(folder, lambda: f"the {len(self)} {what}" if saved_something(folder) else None):
                yield
        finally:
            if distributed.first():
                remove_unless_saved(folder)


def worth_showing(lines: Sequence[Line]) -> list[str]:
    """The figures that were measured, without one that is the same as another everywhere."""
    kept = [key for key in FIGURES if any(line[key] is not None for line in lines)]
    same = all(line["locality"] == line["locality_agreement"] for line in lines)
    return [key for key in kept if not (same and key == "locality_agreement" and "locality" in kept)]


def percent(value: float | None, spread: float | None = None) -> str:
    """A rate for people, with its standard deviation if there is one."""
    return "-" if value is None else f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")


def describe_figures(line: Line) -> str:
    """A line's figures in a few words."""
    if line["reliability"] is None:
        return "the loss was not finite"
    shown = (f"{key.replace('_', ' ')} {percent(line[key])}" for key in worth_showing([line]))
    return ", ".join(shown) + " %"


def label(settings: Mapping[str, Any], without: str | None = None) -> str:
    """A run's settings in few words: values, with their key where a value alone says nothing."""
    parts = (
        value if isinstance(value, str) else f"{key}={json.dumps(value)}"
        for key, value in settings.items()
        if key not in (without, "seed") and value is not None
    )
    return ", ".join(parts) or "all runs"


def write_table(folder: Path, name: str, result: Mapping[str, Any], rows: Sequence[Line]) -> None:
    """NAME.json with the whole `result`, NAME.csv with its rows."""
    import pandas as pd

    write_json(folder / f"{name}.json", result)
    flat = [{k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows]
    pd.DataFrame(flat, dtype=object).to_csv(folder / f"{name}.csv", index=False)


def print_table(title: str, rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """Rows of text under their keys; the first column holds names, the others numbers."""
    table = Table(title=plain(title), title_justify="left")
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        table.add_row(*map(plain, row.values()))
    console.print(table)

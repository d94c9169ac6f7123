"""The lines of a sweep: kept one by one while it runs, written as a table and a picture when it is done."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.io.atomic import kept_jsonl, write_json, write_whole_json
from locft_jax.studies.locate.rule import FIGURES

# Of a sweep's runs also the reliability where nothing but EOS ends an answer: what `append_eos` is for.
RATES = (FIGURES[0], "reliability_eos_only", *FIGURES[1:])
SHORT = dict(zip(RATES, ("rel.", "eos", "gen.", "loc.", "agr.", "cap."), strict=True))
Line = Mapping[str, Any]


def open_lines(folder: Path, known: Mapping[str, str], resume: bool) -> dict[str, Line]:
    """The finished runs in `folder` by name, {} unless it is to `resume`; `known`: what each run of the sweep
    is (name -> digest). Raises UserError for a finished run that the sweep does not have, or has with other
    settings, data or model."""
    path = folder / "runs.jsonl"
    if not resume:
        path.unlink(missing_ok=True)
    lines: dict[str, Line] = {line["name"]: line for line in kept_jsonl(path)}
    for name, line in lines.items():
        if known.get(name) != line["run"]:
            what = "with other settings, data or model" if name in known else "which is not in this sweep"
            raise UserError(
                f"--resume: {folder.parent} holds the run {name}, {what}; use the file and data of that "
                "sweep (further runs may be added), or another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole_json(folder / "run.json", dict(known))
    return lines


def grouped(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Runs that differ by their seed only as one row: settings without it, `seeds` (how many), and of every
    figure the mean, and as `KEY_spread` the standard deviation over seeds (None for one seed)."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        settings = {k: v for k, v in line["settings"].items() if k != "seed"}
        groups.setdefault(json.dumps(settings), []).append(line)
    rows = []
    for text, own in groups.items():
        row: dict[str, Any] = {"settings": json.loads(text), "seeds": len(own)}
        for key in (*RATES, "steps", "edit_seconds"):
            values = [line[key] for line in own if line.get(key) is not None]
            row[key] = statistics.fmean(values) if values else None
            row[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def write_results(folder: Path, lines: Sequence[Line], facts: Mapping[str, Any]) -> dict[str, Any]:
    """sweep.json, sweep.csv, sweep.png; where runs were measured as they went, dynamics.png; where they keep
    other knowledge in different ways, frontier.png. What sweep.json holds."""
    from locft_jax.studies.sweep import frontier
    from locft_jax.studies.sweep.figure import draw_dynamics, draw_sweep

    result: dict[str, Any] = {**facts, "rows": grouped(lines), "runs": list(lines)}
    if frontier.is_frontier(result["rows"]):
        result["recommendation"] = frontier.recommend(result["rows"])
        frontier.draw_frontier(result["rows"], facts["title"], folder / "frontier.png")
    write_json(folder / "sweep.json", result)
    keys = list(lines[0]["settings"])
    with (folder / "sweep.csv").open("w", encoding="utf-8", newline="") as f:
        columns = [*keys, *RATES, "steps", "epochs", "stopped", "edit_seconds"]
        writer = csv.DictWriter(f, columns, extrasaction="ignore")
        writer.writeheader()
        for line in lines:
            settings = {k: v if isinstance(v, (str, int, float)) else json.dumps(v)
                        for k, v in line["settings"].items()}  # fmt: skip
            writer.writerow({**line, **settings})
    draw_sweep(result["rows"], facts["before"], facts["title"], folder / "sweep.png")
    if any(line["dynamics"] for line in lines):
        draw_dynamics(lines, facts["title"], folder / "dynamics.png")
    return result


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """One row a setting: figures in percent, with their spread over seeds."""
    rows = result["rows"]
    shown = [key for key in RATES if any(row[key] is not None for row in rows)]
    table = Table(title=plain(f"{result['title']}, %"), title_justify="left")
    table.add_column("run")
    for column in (*(SHORT[key] for key in shown), "steps", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)

    def percent(value: float | None, spread: float | None = None) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")

    number = lambda value: "-" if value is None else f"{value:,.0f}"  # noqa: E731
    table.add_row("unedited", *(percent(result["before"].get(key)) for key in shown), "", "")
    for row in rows:
        rates = (percent(row[key], row[f"{key}_spread"]) for key in shown)
        table.add_row(
            plain(label(row["settings"])), *rates, number(row["steps"]), number(row["edit_seconds"])
        )
    console.print(table)
    console.print("; ".join(f"{SHORT[key]} {key.replace('_', ' ')}" for key in shown))
    if "recommendation" in result:
        console.print(plain(f"What to use: {result['recommendation']['words']}"))
        for line in ["", *result["recommendation"]["config"].splitlines(), ""]:
            console.print(plain(line))


def label(settings: Mapping[str, Any], without: str | None = None) -> str:
    """A run's settings in few words: values, with their key where a value alone says nothing."""
    parts = (
        value if isinstance(value, str) else f"{key}={json.dumps(value)}"
        for key, value in settings.items()
        if key not in (without, "seed") and value is not None
    )
    return ", ".join(parts) or "all runs"

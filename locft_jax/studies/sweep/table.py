"""The lines of a sweep: kept one by one while it runs, written as a table and pictures when it is done."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.io.atomic import kept_jsonl, read_json, write_json
from locft_jax.studies.sweep import frontier
from locft_jax.studies.tables import RATES, SHORT, Line, label, percent, print_table, write_table


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
    write_json(folder / "run.json", dict(known))
    return lines


def finished(out: Path, known: Mapping[str, str]) -> bool:
    """Whether `out` holds the results of these very runs, and nothing to resume from."""
    found = read_json(out / "sweep.json")
    return not (out / "checkpoint").exists() and isinstance(found, dict) and found.get("known") == known


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
    from locft_jax.studies import figures

    rows, title = grouped(lines), facts["title"]
    result: dict[str, Any] = {**facts, "rows": rows, "runs": list(lines)}
    if frontier.is_frontier(rows):
        result["recommendation"] = frontier.recommend(rows)
        figures.save(figures.draw_frontier(rows, title), folder / "frontier.png")
    columns = (*RATES, "steps", "epochs", "stopped", "edit_seconds")
    write_table(folder, "sweep", result, [{**r["settings"], **{k: r[k] for k in columns}} for r in lines])
    figures.save(figures.draw_sweep(rows, facts["before"], title), folder / "sweep.png")
    if any(line["dynamics"] for line in lines):
        figures.save(figures.draw_dynamics(lines, title), folder / "dynamics.png")
    return result


def print_results(result: Mapping[str, Any], console: Console) -> None:
    """One row a setting: figures in percent, with their spread over seeds."""
    shown = [key for key in RATES if any(row[key] is not None for row in result["rows"])]
    number = lambda value: "-" if value is None else f"{value:,.0f}"  # noqa: E731
    rows = [{"run": "unedited"} | {SHORT[k]: percent(result["before"].get(k)) for k in shown}]
    rows[0] |= {"steps": "", "seconds": ""}
    for row in result["rows"]:
        rates = {SHORT[key]: percent(row[key], row[f"{key}_spread"]) for key in shown}
        spent = {"steps": number(row["steps"]), "seconds": number(row["edit_seconds"])}
        rows.append({"run": label(row["settings"]), **rates, **spent})
    print_table(f"{result['title']}, %", rows, console)
    console.print("; ".join(f"{SHORT[key]} {key.replace('_', ' ')}" for key in shown))
    if "recommendation" in result:
        console.print(plain(f"What to use: {result['recommendation']['words']}"))
        for line in ["", *result["recommendation"]["config"].splitlines(), ""]:
            console.print(plain(line))

"""A sweep file -> its runs, and what their lines come to. The file has the keys of all runs, the `config`
that they change (relative to the file, or `demo`), a `grid` of values, of which every combination is a run,
and `also` further runs, each a mapping; configs/paper/ has some."""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from locft_jax.config import DEMO_CONFIG, Config, canonical, config_from_dict, config_to_dict, load_config
from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.rules import read_yaml, shown
from locft_jax.studies.rule import is_frontier, recommend_settings
from locft_jax.studies.tables import RATES, SHORT, Line, label, percent, print_table, write_table

MOST = 10_000  # runs; more would be a mistake


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell: its config, and the settings that tell it from the others."""

    config: Config
    settings: dict[str, Any]  # key -> value, plain JSON types

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={shown(value)}" for key, value in self.settings.items())


def read_sweep(path: Path, overrides: Sequence[str] = (), config: str | None = None) -> list[Run]:
    """The runs of a sweep file, in its order. Later ones win: the config (`config`, a path or `demo`, in
    place of the file's own), the file's keys, `overrides` (`key=value`), the grid. Raises UserError for a
    malformed file, an unknown key, a bad value, or the same run twice."""
    values = read_yaml(path)
    grid, also, base = values.pop("grid", {}), values.pop("also", []), values.pop("config", None)
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UserError(f"{path}: `grid` must map keys to lists of values, for example `seed: [0, 1]`")
    if not isinstance(also, list) or not all(isinstance(v, Mapping) and v for v in also):
        raise UserError(f"{path}: `also` must be a list of mappings, each the settings of a further run")
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: `config` must be the path of a config file, or demo")
    cells = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())] if grid else []
    cells = [canonical(cell, str(path)) for cell in [*cells, *also]]
    if not cells:
        raise UserError(f"{path}: no runs; give a `grid` of values, or runs under `also`")
    if len(cells) > MOST:
        raise UserError(f"{path}: {len(cells)} runs; a sweep has at most {MOST}")
    base = config or (str(path.parent / base) if base not in (None, "demo") else base)
    shared = shared_keys(str(DEMO_CONFIG) if base == "demo" else base, values, overrides, str(path))
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    configs = [config_from_dict({**shared, **cell}, str(path)) for cell in cells]
    if not all(own.evaluate for own in configs):
        raise UserError(f"{path}: evaluate: a sweep measures every run; leave it true")
    runs = [Run(own, {key: config_to_dict(own)[key] for key in keys}) for own in configs]
    names = [run.name for run in runs]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"{path}: the run {twice} is there twice")
    return runs


def shared_keys(
    base: str | None, values: Mapping[str, Any], overrides: Sequence[str], where: str
) -> dict[str, Any]:
    """What all runs have, through the config's own reader: its checks, its messages, its notes."""
    given = config_to_dict(config_from_dict(values, where))
    if base is None:
        return config_to_dict(load_config(None, overrides, values))
    said = canonical({pair.partition("=")[0].strip(): "" for pair in overrides}, "command line")
    own = {key: given[key] for key in canonical(values, where) if key not in said}
    return config_to_dict(load_config(base, overrides)) | own


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
    """sweep.json, sweep.csv, sweep.png; where runs were measured as they went, dynamics.png; where they
    preserve in different ways, frontier.png. What sweep.json holds."""
    from locft_jax.studies import figures  # matplotlib and pandas come with it

    rows, title = grouped(lines), facts["title"]
    result: dict[str, Any] = {**facts, "rows": rows, "runs": list(lines)}
    pictures = {"sweep": figures.draw_sweep(rows, facts["before"], title)}
    if is_frontier(rows):
        result["recommendation"] = recommend_settings(rows)
        pictures["frontier"] = figures.draw_frontier(rows, title)
    if any(line["dynamics"] for line in lines):
        pictures["dynamics"] = figures.draw_dynamics(lines, title)
    columns = (*RATES, "steps", "epochs", "stopped", "edit_seconds")
    write_table(folder, "sweep", result, [{**r["settings"], **{k: r[k] for k in columns}} for r in lines])
    for name, picture in pictures.items():
        picture.savefig(folder / f"{name}.png")
    return result


def print_results(result: Mapping[str, Any], console: Console) -> None:
    """One row a setting: figures in percent, with their spread over seeds."""
    shown = [key for key in RATES if any(row[key] is not None for row in result["rows"])]
    number = lambda value: "-" if value is None else f"{value:,.0f}"  # noqa: E731
    unedited = {"run": "unedited"} | {SHORT[k]: percent(result["before"].get(k)) for k in shown}
    rows = [unedited | {"steps": "", "seconds": ""}]
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

"""A sweep file -> its runs.

config: ../llama3-8b-zsre.yaml      a config, relative to this file, or `demo` (optional)
num_edits: 1000                     keys that all runs have, over those of the config
grid:                               every combination of these values is a run
  pipeline: [depth, breadth]
  batch_size: [1, 100]
also:                               and so is each of these (optional)
  - {method: ft-l, pipeline: depth, batch_size: 1}
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.config import DEMO_CONFIG, Config, canonical, config_from_dict, config_to_dict, load_config
from locft_jax.errors import UserError
from locft_jax.rules import read_yaml, shown

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
    if config is not None:
        base = config
    elif base is not None and base != "demo":
        base = str(path.parent / base)
    base = str(DEMO_CONFIG) if base == "demo" else base
    cells = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())] if grid else []
    cells += [dict(cell) for cell in also]
    if not cells:
        raise UserError(f"{path}: no runs; give a `grid` of values, or runs under `also`")
    if len(cells) > MOST:
        raise UserError(f"{path}: {len(cells)} runs; a sweep has at most {MOST}")
    # Through the config's own reader: its checks, its messages, its notes.
    shared = config_to_dict(load_config(base, overrides, None if base else _checked(values, path)))
    if base:
        given = _checked(values, path)
        plain = config_to_dict(config_from_dict(given, str(path)))
        said = canonical({pair.partition("=")[0].strip(): "" for pair in overrides}, "command line")
        shared |= {key: plain[key] for key in canonical(given, str(path)) if key not in said}
    cells = [canonical(cell, str(path)) for cell in cells]
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    runs = []
    for cell in cells:
        own = config_from_dict({**shared, **cell}, str(path))
        if not own.evaluate:
            raise UserError(f"{path}: evaluate: a sweep measures every run; leave it true")
        plain = config_to_dict(own)
        runs.append(Run(own, {key: plain[key] for key in keys}))
    names = [run.name for run in runs]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{path}: the run {twice} is there twice")
    return runs


def _checked(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys that all runs have, their names and values looked at. Raises UserError."""
    config_from_dict(values, str(path))
    return dict(values)

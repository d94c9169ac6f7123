"""The pictures of a sweep: figures over the key that was varied, or as bars; learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.studies.locate.figure import COLOURS, MARKERS, finish, new_figure
from locft_jax.studies.locate.rule import worth_showing
from locft_jax.studies.sweep.table import label

MOST = 8  # curves in a panel

Row = Mapping[str, Any]


def horizontal(rows: Sequence[Row]) -> str | None:
    """The key that stands on the horizontal axis: a number in every row, the one with most different ones, at
    least three; None where there is none, or where there would be more than MOST curves (bars then)."""
    found: dict[str, set[float]] = {}
    for row in rows:
        for key, value in row["settings"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(key, set()).add(value)
    most = max(found, key=lambda key: len(found[key]), default=None)
    if (
        most is None
        or len(found[most]) < 3
        or not all(isinstance(row["settings"][most], (int, float)) for row in rows)
    ):
        return None
    return most if len({label(row["settings"], most) for row in rows}) <= MOST else None


def draw_sweep(rows: Sequence[Row], before: Mapping[str, float | None], title: str, out: Path) -> None:
    """One panel a figure. Over the key with most numbers: one curve for every combination of the others; else
    one bar a run. Lines at a point: the standard deviation over seeds. Dashed: the unedited model. PNG."""
    keys, across = worth_showing(rows), horizontal(rows)
    columns = min(2 if len(keys) == 4 else 3, len(keys))
    lines = -(-len(keys) // columns)
    height = 3.6 if across else 1.1 + 0.42 * len(rows)
    figure = new_figure((5.2 if across else 4.6) * columns + (0 if across else 1.5), height * lines + 0.9)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=across is None).reshape(-1)
    for axis, key in zip(axes, keys, strict=False):
        _curves(axis, rows, key, across) if across else _bars(axis, rows, key)
        level = before.get(key)
        if level is not None:
            draw = axis.axhline if across else axis.axvline
            draw(100 * level, color="#555555", linestyle="--", label="unedited")
        axis.set_title(key.replace("_", " "), fontsize=13)
        axis.tick_params(labelsize=11)
        axis.grid(color="#dddddd", axis="both" if across else "x")
        axis.set_axisbelow(True)
    finish(figure, axes, len(keys), title, out, legend=3 if across else 0)


def _curves(axis: Any, rows: Sequence[Row], key: str, across: str) -> None:
    names = list(dict.fromkeys(label(row["settings"], across) for row in rows))
    for i, name in enumerate(names):
        own = [r for r in rows if label(r["settings"], across) == name and r[key] is not None]
        own.sort(key=lambda r: r["settings"][across])
        if own:
            axis.errorbar(
                [r["settings"][across] for r in own],
                [100 * r[key] for r in own],
                yerr=[100 * (r[f"{key}_spread"] or 0) for r in own],
                label=name, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], capsize=3,
            )  # fmt: skip
    values = sorted({row["settings"][across] for row in rows})
    if values[0] > 0 and values[-1] / values[0] >= 5:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.set_xticks([], minor=True)
    low, high = axis.get_ylim()
    if high - low < 5:  # a difference of nothing must not look like one
        axis.set_ylim((low + high) / 2 - 2.5, (low + high) / 2 + 2.5)
    axis.set_xlabel(across.replace("_", " "), fontsize=12)
    axis.set_ylabel("%", fontsize=12)


def _bars(axis: Any, rows: Sequence[Row], key: str) -> None:
    places = range(len(rows))[::-1]  # the first run on top
    values = [100 * (row[key] or 0) for row in rows]
    spread = [100 * (row[f"{key}_spread"] or 0) for row in rows]
    axis.barh(places, values, xerr=spread if any(spread) else None, color=COLOURS[0], height=0.7, capsize=3)
    axis.set_yticks(places, [label(row["settings"]) for row in rows], fontsize=11)
    axis.set_xlim(0, 122)
    axis.set_xticks(range(0, 101, 20))
    for place, value, off in zip(places, values, spread, strict=True):
        axis.text(
            value + off + 1.5,
            place,
            f"{value:.1f}",
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axis.set_xlabel("%", fontsize=12)


def draw_dynamics(lines: Sequence[Mapping[str, Any]], title: str, out: Path) -> None:
    """One panel a run: reliability of each fifth of the edits, in the order of the data, and of all, as the
    run goes on (paper, learning dynamics). PNG."""
    runs = [line for line in lines if line["dynamics"]]
    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    figure = new_figure(5.2 * columns, 3.4 * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).reshape(-1)
    for axis, line in zip(axes, runs, strict=False):
        at = [look["step"] for look in line["dynamics"]]
        parts = zip(*(look["shards"] for look in line["dynamics"]), strict=True)
        for i, part in enumerate(parts):
            values = [float("nan") if v is None else 100 * v for v in part]
            axis.plot(at, values, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                      markersize=4, label=f"fifth {i + 1} of the edits")  # fmt: skip
        whole = [100 * look["figures"]["reliability"] for look in line["dynamics"]]
        axis.plot(at, whole, color="#555555", linestyle="--", linewidth=2, label="all edits")
        axis.set_title(label(line["settings"]), fontsize=12)
        axis.set_xlabel("steps", fontsize=12)
        axis.set_ylabel("reliability, %", fontsize=12)
        axis.set_ylim(-3, 103)
        axis.grid(color="#dddddd")
    finish(figure, axes, len(runs), title, out, legend=3)

"""The pictures of studies, rates in percent: curves over the layers, heat maps, sweeps, learning dynamics,
the frontier of ways to preserve. Each function returns a figure that needs no display."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from locft_jax.studies.rule import measured, method_of, pick
from locft_jax.studies.tables import FIGURES, Line, label, worth_showing

COLOURS = "colorblind"  # of seaborn; markers tell the curves apart again
GREY, FRAME = "#555555", "#D55E00"
NAMED = 16  # layers up to which every cell of a heat map shows its number
MOST = 8  # curves in a panel
BELOW = 12  # points under the settings to use that the frontier reaches


def draw_curves(lines: Sequence[Line], before: Mapping[str, float | None], title: str) -> Figure:
    """One panel a figure, one curve a module, over the layers; dashed: the unedited model."""
    keys, frame = worth_showing(lines), _percents(lines, "layer", "module")
    figure, axes = _panels(len(keys), 2, (5.2, 3.4), sharex=True)
    layers = sorted(frame["layer"].unique())
    for axis, key in zip(axes, keys, strict=True):
        sns.lineplot(frame, x="layer", y=key, hue="module", style="module", palette=COLOURS, markers=True,
                     dashes=False, ax=axis)  # fmt: skip
        axis.set(title=key.replace("_", " "), ylabel="%", xticks=layers[:: -(-len(layers) // NAMED)])
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("layer", visible=True)
        _unedited(axis, before.get(key))
    return _finished(figure, title, 6)


def draw_heat_maps(lines: Sequence[Line], top: tuple[int, str], title: str) -> Figure:
    """One panel a figure, layers across, modules down; the site `top` (layer, module) is framed."""
    keys, frame = worth_showing(lines), _percents(lines, "layer", "module")
    modules, layers = list(frame["module"].unique()), sorted(frame["layer"].unique())
    size = 2.8 + 0.55 * max(6, min(len(layers), 24)), 1.5 + 0.45 * len(modules)
    figure, axes = _panels(len(keys), 2, size, style="ticks")
    for axis, key in zip(axes, keys, strict=True):
        values = frame.pivot(index="module", columns="layer", values=key).reindex(modules)
        low, high = values.min(axis=None), values.max(axis=None)
        low = min(low, (low + high) / 2 - 2.5)  # a difference of nothing must not look like one
        sns.heatmap(values, vmin=low, vmax=max(high, low + 5), cmap="cividis", annot=len(layers) <= NAMED,
                    fmt=".0f", cbar_kws={"fraction": 0.04, "pad": 0.02}, ax=axis)  # fmt: skip
        axis.set(title=f"{key.replace('_', ' ')}, %", ylabel="", facecolor="#cccccc")  # grey: not measured
        axis.tick_params(axis="both", labelrotation=0)
        at = layers.index(top[0]), modules.index(top[1])
        axis.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=FRAME, linewidth=3, clip_on=False))
    return _finished(figure, title)


def horizontal(rows: Sequence[Line]) -> str | None:
    """The key on the horizontal axis: a number in every row, the one with most different ones, three or more;
    None where there is none, or where there would be more than MOST curves (bars then)."""
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)  # noqa: E731
    keys = [k for k in rows[0]["settings"] if all(number(row["settings"][k]) for row in rows)]
    counts = {key: len({row["settings"][key] for row in rows}) for key in keys}
    most = max(counts, key=counts.__getitem__, default="")
    curves = len({label(row["settings"], most) for row in rows})
    return most if counts.get(most, 0) >= 3 and curves <= MOST else None


def draw_sweep(rows: Sequence[Line], before: Mapping[str, float | None], title: str) -> Figure:
    """One panel a figure. Over the key with most numbers: one curve for every combination of the others; else
    one bar a run. Error bars: the standard deviation over seeds. Dashed: the unedited model."""
    keys, across = worth_showing(rows), horizontal(rows)
    size = (5.2, 3.6) if across else (5.1, 1.1 + 0.42 * len(rows))
    figure, axes = _panels(len(keys), 2 if len(keys) == 4 else 3, size, sharey=across is None)
    for axis, key in zip(axes, keys, strict=True):
        _sweep_curves(axis, rows, key, across) if across else _sweep_bars(axis, rows, key)
        axis.set_title(key.replace("_", " "))
        _unedited(axis, before.get(key), across=across is not None)
    return _finished(figure, title, 3 if across else 0)


def _sweep_curves(axis: Axes, rows: Sequence[Line], key: str, across: str) -> None:
    names = list(dict.fromkeys(label(row["settings"], across) for row in rows))
    for name, colour, marker in zip(names, sns.color_palette(COLOURS, len(names)), "osD^vPX*", strict=False):
        own = [r for r in rows if label(r["settings"], across) == name and r[key] is not None]
        drawn = sorted((r["settings"][across], 100 * r[key], 100 * (r[f"{key}_spread"] or 0)) for r in own)
        x, y, spread = np.reshape(drawn, (-1, 3)).T
        size = 3 if spread.any() else 0
        axis.errorbar(x, y, spread, label=name, color=colour, marker=marker, capsize=size)
    axis.set(xlabel=across.replace("_", " "), ylabel="%")
    values = sorted({row["settings"][across] for row in rows})
    if values[0] > 0 and values[-1] / values[0] >= 5:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.set_xticks([], minor=True)


def _sweep_bars(axis: Axes, rows: Sequence[Line], key: str) -> None:
    values = [float("nan") if row[key] is None else 100 * row[key] for row in rows]
    spread = [100 * (row[f"{key}_spread"] or 0) for row in rows]
    bars = axis.barh(range(len(rows)), values, xerr=spread if any(spread) else None, height=0.7, capsize=3)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(bars, fmt="%.1f", padding=4, fontsize=10, bbox=box)
    axis.set_yticks(range(len(rows)), [label(row["settings"]) for row in rows])
    axis.set(xlim=(0, 122), xticks=range(0, 101, 20), xlabel="%", ylim=(len(rows) - 0.5, -0.5))
    axis.grid(visible=False, axis="y")


def draw_dynamics(lines: Sequence[Line], title: str) -> Figure:
    """One panel a run: reliability of each fifth of the edits (by their order) and of all, over the steps."""
    runs = [line for line in lines if line["dynamics"]]
    figure, axes = _panels(len(runs), 2, (5.2, 3.4), sharey=True)
    for axis, line in zip(axes, runs, strict=True):
        steps = [look["step"] for look in line["dynamics"]]
        parts = 100 * pd.DataFrame([look["shards"] for look in line["dynamics"]], steps, dtype=float)
        parts.columns = [f"fifth {i + 1} of the edits" for i in parts.columns]
        whole = [100 * look["figures"]["reliability"] for look in line["dynamics"]]
        sns.lineplot(parts, palette=COLOURS, markers=True, dashes=False, markersize=6, ax=axis)
        axis.plot(steps, whole, color=GREY, linestyle="--", linewidth=2, label="all edits")
        axis.set(title=label(line["settings"]), xlabel="steps", ylabel="reliability, %", ylim=(-3, 103))
    return _finished(figure, title, 3)


def draw_frontier(rows: Sequence[Line], title: str) -> Figure:
    """Reliability and generalization over what was kept, a colour a method: settings as points, those that no
    other of the method beats on both axes joined; ringed: the settings to use. What edits far worse than
    these is outside the picture."""
    rows = measured(rows, "locality_agreement")
    top, frame = pick(rows), _percents(rows)
    frame["method"] = [method_of(row["settings"]) for row in rows]
    methods = list(frame["method"].unique())
    present = lambda *keys: [key for key in keys if frame[key].notna().any()]  # noqa: E731
    kept, edited = present("locality_agreement", "capability"), present("reliability", "generalization")
    figure, axes = _panels(len(kept) * len(edited), len(kept), (5.4, 3.9))
    for axis, (y, x) in zip(axes, itertools.product(edited, kept), strict=True):
        known = frame.dropna(subset=[x, y])
        own = {"x": x, "y": y, "hue": "method", "hue_order": methods, "palette": COLOURS, "ax": axis}
        sns.lineplot(known[~_beaten(known, x, y)], estimator=None, legend=False, **own)
        sns.scatterplot(known, style="method", style_order=methods, s=60, **own)
        if top[x] is not None and top[y] is not None:
            axis.plot(100 * top[x], 100 * top[y], "o", markersize=15, markerfacecolor="none",
                      markeredgecolor="black", label="to use")  # fmt: skip
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 100 * top[y] - BELOW))
        axis.set(xlabel=f"{x.replace('_', ' ')}, %", ylabel=f"{y}, %")
    return _finished(figure, title, 4)


def _beaten(frame: pd.DataFrame, x: str, y: str) -> Any:
    """Which rows another of the same method beats on both axes, as a mask."""

    def beaten(row: Any) -> bool:
        own, other = frame.loc[frame["method"] == row["method"], [x, y]], row[[x, y]]
        return bool(((own >= other).all(axis=1) & (own > other).any(axis=1)).any())

    return frame.apply(beaten, axis=1)


def _percents(lines: Sequence[Line], *names: str) -> pd.DataFrame:
    """Figures in percent, NaN where not measured, beside the columns `names`."""
    frame = pd.DataFrame([{key: line[key] for key in (*names, *FIGURES)} for line in lines])
    return frame.assign(**{key: 100 * frame[key].astype(float) for key in FIGURES})


def _panels(
    count: int, columns: int, size: tuple[float, float], style: str = "whitegrid", **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of so many inches each, at most `columns` beside each other."""
    columns, rows = min(columns, count), -(-count // min(columns, count))
    with sns.axes_style(style), sns.plotting_context("notebook"):
        figure = Figure((size[0] * columns, size[1] * rows + 0.9), dpi=110, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **shared).reshape(-1)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def _unedited(axis: Axes, level: float | None, across: bool = True) -> None:
    """A dashed line at the unedited model's figure, if there is one; `across` a panel that shows at least
    five points: a difference of nothing must not look like one."""
    if level is not None:
        draw = axis.axhline if across else axis.axvline
        draw(100 * level, color=GREY, linestyle="--", label="unedited")
    low, high = axis.get_ylim()
    if across and high - low < 5:
        axis.set_ylim((low + high) / 2 - 2.5, (low + high) / 2 + 2.5)


def _finished(figure: Figure, title: str, columns: int = 0) -> Figure:
    """The figure with its title, and one legend for all panels in so many columns (0: none)."""
    shown: dict[str, Any] = {}
    for axis in figure.axes:
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if (own := axis.get_legend()) is not None:
            own.remove()
    if columns:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    return figure

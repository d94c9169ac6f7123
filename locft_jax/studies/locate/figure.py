"""Two pictures of a table of sites: curves over the layers, as in the paper, and heat maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.studies.locate.rule import worth_showing

# Okabe and Ito's colours, told apart by colour-blind readers too; markers say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
NAMED = 16  # layers up to which every cell of a heat map shows its number

Line = Mapping[str, Any]


def draw_curves(lines: Sequence[Line], before: Mapping[str, float | None], title: str, out: Path) -> None:
    """One panel a figure, one curve a module, over the layers; dashed: the unedited model. PNG."""
    keys, modules = worth_showing(lines), list(dict.fromkeys(line["module"] for line in lines))
    layers = sorted({line["layer"] for line in lines})
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    figure = new_figure(5.2 * columns, 3.4 * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
    for axis, key in zip(axes, keys, strict=False):
        for i, module in enumerate(modules):
            own = sorted((line["layer"], 100 * line[key]) for line in _with(lines, key, module))
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            dashes = "-" if i < len(COLOURS) else ":"
            axis.plot(*zip(*own, strict=True), dashes, label=module, **style) if own else None
        level = before.get(key)
        if level is not None:
            axis.axhline(100 * level, color="#555555", linestyle="--", label="unedited")
        axis.set_title(key.replace("_", " "), fontsize=13)
        axis.set_ylabel("%", fontsize=12)
        low, high = axis.get_ylim()
        if high - low < 5:  # a difference of nothing must not look like one
            axis.set_ylim((low + high) / 2 - 2.5, (low + high) / 2 + 2.5)
        axis.set_xticks(layers[:: -(-len(layers) // NAMED)])
        axis.tick_params(labelsize=11, labelbottom=True)
        axis.grid(color="#dddddd")
        axis.set_xlabel("layer", fontsize=12)
    finish(figure, axes, len(keys), title, out, legend=6)


def draw_heat_maps(lines: Sequence[Line], top: tuple[int, str], title: str, out: Path) -> None:
    """One panel a figure, layers across, modules down; the site `top` (layer, module) is framed. PNG."""
    import numpy as np
    from matplotlib.patches import Rectangle

    keys, modules = worth_showing(lines), list(dict.fromkeys(line["module"] for line in lines))
    layers = sorted({line["layer"] for line in lines})
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    width = 2.8 + 0.55 * max(6, min(len(layers), 2 * NAMED))
    figure = new_figure(width * columns, rows * (1.5 + 0.45 * len(modules)) + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis, key in zip(axes, keys, strict=False):
        values = np.full((len(modules), len(layers)), np.nan)
        for line in lines:
            if line[key] is not None:
                values[modules.index(line["module"]), layers.index(line["layer"])] = 100 * line[key]
        low, high = np.nanmin(values), np.nanmax(values)
        middle = max(0, high - low - 5) and low or (low + high) / 2 - 2.5
        image = axis.imshow(values, cmap="cividis", aspect="auto", vmin=middle, vmax=max(high, middle + 5))
        axis.set_facecolor("#cccccc")  # what was not measured
        axis.set_title(f"{key.replace('_', ' ')}, %", fontsize=13)
        axis.set_yticks(range(len(modules)), modules, fontsize=12)
        shown = range(0, len(layers), -(-len(layers) // (2 * NAMED)))
        axis.set_xticks(shown, [layers[i] for i in shown], fontsize=11)
        axis.set_xlabel("layer", fontsize=12)
        if len(layers) <= NAMED:
            for (row, column), value in np.ndenumerate(values):
                if not np.isnan(value):
                    dark = image.norm(value) < 0.55
                    colour = "white" if dark else "black"
                    axis.text(
                        column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=11
                    )
        at = layers.index(top[0]) - 0.5, modules.index(top[1]) - 0.5
        axis.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor="#D55E00", linewidth=3, clip_on=False))
        figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    finish(figure, axes, len(keys), title, out)


def _with(lines: Sequence[Line], key: str, module: str) -> list[Line]:
    return [line for line in lines if line["module"] == module and line[key] is not None]


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Any, axes: Sequence[Any], used: int, title: str, out: Path, legend: int = 0) -> None:
    """Hide the panels beyond the first `used`, and save; `legend`: columns of what the first one shows."""
    for axis in axes[used:]:
        axis.set_visible(False)
    if legend:
        found = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=legend, fontsize=12, frameon=False
        )
    figure.suptitle(title, fontsize=14)
    figure.savefig(out, dpi=110)

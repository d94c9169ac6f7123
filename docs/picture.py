"""The README's picture: figures before and after an edit, from the run's report.json.

make demo && python docs/picture.py runs/demo/report.json docs/demo.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = {
    "reliability": "reliability\nthe edited prompts give\nthe new answer",
    "generalization": "generalization\nother phrasings of\nthe edits do so too",
    "locality": "locality\nother facts are\nanswered right",
    "capability": "capability\nskills that no edit\nis about",
}


def main(report: Path, out: Path) -> None:
    """One pair of bars a figure, in percent."""
    run = json.loads(report.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(8.6, 3.2), layout="constrained")
    for shift, when, color in ((-0.19, "before", "#b8bfc9"), (0.19, "after", "#1f6feb")):
        values = [100 * run[when][name] for name in FIGURES]
        places = [i + shift for i in range(len(values))]
        bars = axes.bar(places, values, width=0.36, color=color, label=when)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xticks(range(len(FIGURES)), FIGURES.values(), fontsize=9)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    probes = sum(run["probes"].values())
    axes.set_title(
        f"{run['edits']} edits of the demo model, {run['epochs_run']} epochs, {probes:,} probes", fontsize=10
    )
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

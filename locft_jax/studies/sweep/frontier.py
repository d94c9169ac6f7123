"""How much a method keeps of what was not edited, against how well it edits: the frontier of a sweep over
`preserve...` keys, plain LocFT-BF among the rest, and the settings to use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.flat_yaml import shown as yaml
from locft_jax.studies.locate.figure import COLOURS, MARKERS, finish, new_figure
from locft_jax.studies.locate.rule import ENOUGH
from locft_jax.studies.sweep.table import label

KEEPING = ("preserve", "preserve_data", "preserve_kl", "preserve_strength", "preserve_tokens")
BELOW = 12  # points under the settings to use that the picture reaches
KEPT, EDITED = ("locality_agreement", "capability"), ("reliability", "generalization")

Row = Mapping[str, Any]


def is_frontier(rows: Sequence[Row]) -> bool:
    """Whether a sweep compares how other knowledge is kept: it varies a `preserve...` key, and asked other
    facts."""
    return len(rows) > 1 and any(key in rows[0]["settings"] for key in KEEPING) and any(_measured(rows))


def method_of(settings: Mapping[str, Any]) -> str:
    """What keeps other knowledge in these settings, without how strongly: `plain`, `soft`, `KL`, `soft + KL`,
    with the source of its texts if there is one."""
    own = settings.get("preserve", "none")
    parts = [*([] if own in ("none", None) else [own]), *(["KL"] if settings.get("preserve_kl") else [])]
    source = settings.get("preserve_data")
    last = ", last tokens" if settings.get("preserve_tokens") == "last" else ""
    return (" + ".join(parts) + (f", {Path(source).name}" if source else "") + last) if parts else "plain"


def pick(rows: Sequence[Row]) -> Row:
    """Of the rows with reliability >= ENOUGH (else: of the highest reliability) the one that changes fewest
    of the other answers; then the one that generalizes best."""
    known = _measured(rows)
    highest = max(row["reliability"] for row in known)
    good = [row for row in known if row["reliability"] >= min(ENOUGH, highest)]
    return max(good, key=lambda row: (row["locality_agreement"], row["generalization"] or 0.0))


def recommend(rows: Sequence[Row]) -> dict[str, Any]:
    """The settings to use: {"settings", "words", "config"}."""
    top = pick(rows)
    plain = [row for row in _measured(rows) if method_of(row["settings"]) == "plain"]
    percent = lambda value: "-" if value is None else f"{100 * value:.1f} %"  # noqa: E731
    shown = ("reliability", "generalization", "locality_agreement", "capability")
    told = lambda row: ", ".join(f"{k.replace('_', ' ')} {percent(row[k])}" for k in shown)  # noqa: E731
    words = [f"{label(top['settings'])}: {told(top)}."]
    if top["reliability"] < ENOUGH:
        words.append(f"No setting reaches a reliability of {percent(ENOUGH)}; this one comes closest.")
    if plain and method_of(top["settings"]) != "plain":
        own = pick(plain)
        words.append(f"Plain LocFT-BF at its best ({label(own['settings'])}): {told(own)}.")
        lost, before = 1 - top["locality_agreement"], 1 - own["locality_agreement"]
        if before > 0:
            words.append(f"So {percent(lost)} of the other answers change in place of {percent(before)}.")
    config = "\n".join(f"{key}: {yaml(value)}" for key, value in top["settings"].items())
    return {"settings": top["settings"], "words": " ".join(words), "config": config}


def draw_frontier(rows: Sequence[Row], title: str, out: Path) -> None:
    """Reliability and generalization over what was kept, a colour a method: every setting as a point, those
    that no other setting of the method beats on both axes joined; ringed: the settings to use. What edits far
    worse than these lies outside the picture. PNG."""
    rows, top = _measured(rows), pick(rows)
    across = [key for key in KEPT if any(row[key] is not None for row in rows)]
    down = [key for key in EDITED if any(row[key] is not None for row in rows)]
    methods = list(dict.fromkeys(method_of(row["settings"]) for row in rows))
    figure = new_figure(5.4 * len(across), 3.9 * len(down) + 0.9)
    axes = figure.subplots(len(down), len(across), squeeze=False)
    for j, y in enumerate(down):
        for i, x in enumerate(across):
            axis = axes[j][i]
            for n, method in enumerate(methods):
                own = [
                    (100 * row[x], 100 * row[y])
                    for row in rows
                    if method_of(row["settings"]) == method and row[x] is not None and row[y] is not None
                ]
                best = sorted(p for p in own if not any(_beats(q, p) for q in own))
                colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
                axis.plot(*zip(*best, strict=True), color=colour, linewidth=1.5)
                axis.plot(
                    *zip(*own, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle="",
                    alpha=0.8,
                    label=method,
                )
            if top[x] is not None and top[y] is not None:
                axis.plot(100 * top[x], 100 * top[y], "o", markersize=15, markerfacecolor="none",
                          markeredgecolor="black", label="to use")  # fmt: skip
            axis.set_xlabel(f"{x.replace('_', ' ')}, %", fontsize=12)
            axis.set_ylabel(f"{y}, %", fontsize=12)
            if top[y] is not None:
                low, high = axis.get_ylim()
                axis.set_ylim(max(low, 100 * top[y] - BELOW), high)
            axis.grid(color="#dddddd")
    finish(figure, axes.reshape(-1), axes.size, title, out, legend=min(4, len(methods) + 1))


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["reliability"] is not None and row["locality_agreement"] is not None]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]

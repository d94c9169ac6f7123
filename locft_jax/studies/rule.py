"""Which of the measured lines to use: of sites by the paper's rule (method.md, Where to tune), of a sweep
over `preserve...` keys the settings that change fewest other answers; and the words that say why."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.rules import shown as yaml
from locft_jax.studies.tables import Line, describe_figures, label, percent

ENOUGH = 0.99  # reliability that is to be reached
TIE = 0.005  # capabilities closer than this to the best one count as equal: no test set tells them apart
ABILITIES = ("capability", "locality_agreement")  # general ability is the first of these that was measured


def measured(lines: Sequence[Line], *keys: str) -> list[Line]:
    """Those of the lines that all these figures are known of; an edit that failed has none."""
    return [line for line in lines if all(line[key] is not None for key in ("reliability", *keys))]


def reliable(lines: Sequence[Line]) -> list[Line]:
    """Those of the lines with reliability >= ENOUGH, else those of the highest reliability."""
    least = min(ENOUGH, max(line["reliability"] for line in lines))
    return [line for line in lines if line["reliability"] >= least]


def narrowed(lines: Sequence[Line]) -> tuple[list[Line], list[Line], str | None]:
    """(the `reliable` sites; those of them of the highest general ability; which figure that is, None where
    neither was measured). Raises FloatingPointError when every edit failed."""
    known = measured(lines)
    if not known:
        raise FloatingPointError("the loss was not finite at any site: a smaller lr would be right")
    good = reliable(known)
    ability = next((a for a in ABILITIES if any(line[a] is not None for line in good)), None)
    if ability is None:
        return good, good, None
    top = max(line[ability] for line in good)
    return good, [line for line in good if line[ability] >= top - TIE], ability


def best(lines: Sequence[Line]) -> Line:
    """Of the sites left by `narrowed` the one that generalizes best; then higher ability, fewer other answers
    changed, fewer parameters, a later layer."""
    _, near, ability = narrowed(lines)
    of = lambda line, key: -1.0 if key is None or line[key] is None else line[key]  # noqa: E731
    figures = ("generalization", ability, "locality_agreement")
    return max(near, key=lambda line: (*(of(line, k) for k in figures), -line["parameters"], line["layer"]))


def ranked(lines: Sequence[Line], count: int) -> list[Line]:
    """The first `count` sites in the order of the rule."""
    left, order = measured(lines), list[Line]()
    while left and len(order) < count:
        order.append(best(left))
        left.remove(order[-1])
    return order


def recommend_site(lines: Sequence[Line], before: Mapping[str, float | None]) -> dict[str, Any]:
    """The site to use, in words too, and as lines of a config; `before`: the unedited model's figures."""
    top, (good, near, ability) = best(lines), narrowed(lines)
    least = percent(min(ENOUGH, good[0]["reliability"]))
    words = [f"{top['module']} of layer {top['layer']}: {describe_figures(top)}"]
    words.append(f"{len(good)} of {len(lines)} sites reach a reliability of {least} %")
    if ability is not None:
        highest, was = percent(max(line[ability] for line in good)), percent(before.get(ability))
        close = f"{len(near)} of these come within {100 * TIE:g} points of the highest"
        words.append(f"{close} {ability.replace('_', ' ')}, {highest} % ({was} before)")
    words.append("the one that generalizes best is taken")
    site = {key: top[key] for key in ("layer", "module", "rewrite_module")}
    config = f"layer: {top['layer']}\nrewrite_module: {top['rewrite_module']}"
    return {**site, "words": "; ".join(words), "config": config}


def is_frontier(rows: Sequence[Line]) -> bool:
    """Whether a sweep compares ways to preserve: it varies a `preserve...` key, and asked other facts."""
    varied = len(rows) > 1 and any(key.startswith("preserve") for key in rows[0]["settings"])
    return varied and any(measured(rows, "locality_agreement"))


def method_of(settings: Mapping[str, Any]) -> str:
    """What preserves in these settings, without how strongly: `plain`, `soft`, `KL`, `soft + KL`, with the
    source of its texts if there is one."""
    given = settings.get("preserve"), "KL" if settings.get("preserve_kl") else None
    parts = [part for part in given if part not in ("none", None)]
    source = settings.get("preserve_data")
    last = ", last tokens" if settings.get("preserve_tokens") == "last" else ""
    return " + ".join(parts) + (f", {Path(source).name}" if source else "") + last if parts else "plain"


def pick(rows: Sequence[Line]) -> Line:
    """Of the `reliable` rows the one that changes fewest of the other answers, then generalizes best."""
    good = reliable(measured(rows, "locality_agreement"))
    return max(good, key=lambda row: (row["locality_agreement"], row["generalization"] or 0.0))


def recommend_settings(rows: Sequence[Line]) -> dict[str, Any]:
    """The settings to use, in words that compare them with plain LocFT-BF, and as lines of a config."""
    plain = [row for row in measured(rows, "locality_agreement") if method_of(row["settings"]) == "plain"]
    top = pick(rows)
    said = [top, *([pick(plain)] if plain and method_of(top["settings"]) != "plain" else [])]
    words = "; plain at its best: ".join(f"{label(r['settings'])}: {describe_figures(r)}" for r in said)
    config = "\n".join(f"{key}: {yaml(value)}" for key, value in top["settings"].items())
    return {"settings": top["settings"], "words": words, "config": config}

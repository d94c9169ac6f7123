"""The paper's rule (method.md, Where to tune): which of the measured sites to use."""

from collections.abc import Mapping, Sequence
from typing import Any

from locft_jax.studies.tables import Line, describe_figures, percent

ENOUGH = 0.99  # reliability that a site must reach
TIE = 0.005  # capabilities closer than this to the best one count as equal: no test set tells them apart
ABILITIES = ("capability", "locality_agreement")  # general ability is the first of these that was measured


def measured(lines: Sequence[Line]) -> list[Line]:
    """Those of the sites whose edit did not fail. Raises FloatingPointError when every edit failed."""
    known = [line for line in lines if line["reliability"] is not None]
    if not known:
        raise FloatingPointError("the loss was not finite at any site: a smaller lr would be right")
    return known


def narrowed(lines: Sequence[Line]) -> tuple[list[Line], list[Line], str | None]:
    """(the sites with reliability >= ENOUGH, else of the highest reliability; those of them of the highest
    general ability; which figure that is, None where neither was measured)."""
    known = measured(lines)
    highest = max(line["reliability"] for line in known)
    good = [line for line in known if line["reliability"] >= min(ENOUGH, highest)]
    ability = next((a for a in ABILITIES if any(line[a] is not None for line in good)), None)
    if ability is None:
        return good, good, None
    top = max(line[ability] for line in good)
    return good, [line for line in good if line[ability] >= top - TIE], ability


def best(lines: Sequence[Line]) -> Line:
    """Of the sites left by `narrowed` the one that generalizes best; then higher ability, fewer other answers
    changed, fewer parameters, a later layer. Raises FloatingPointError when every edit failed."""
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


def recommend(lines: Sequence[Line], before: Mapping[str, float | None]) -> dict[str, Any]:
    """The site to use: {"layer", "module", "rewrite_module", "words", "config"}; `before`: the unedited
    model's figures."""
    top, (good, near, ability) = best(lines), narrowed(lines)
    least = percent(min(ENOUGH, good[0]["reliability"]))
    words = [f"{top['module']} of layer {top['layer']}: {describe_figures(top)}"]
    words.append(f"{len(good)} of {len(lines)} sites reach a reliability of {least} %")
    if ability is not None:
        highest = percent(max(line[ability] for line in good)), percent(before.get(ability))
        words.append("{} of these come within {:g} points of the highest {}, {} % ({} before)".format(
            len(near), 100 * TIE, ability.replace("_", " "), *highest))  # fmt: skip
    words.append("the one that generalizes best is taken")
    return {
        "layer": top["layer"],
        "module": top["module"],
        "rewrite_module": top["rewrite_module"],
        "words": "; ".join(words),
        "config": f"layer: {top['layer']}\nrewrite_module: {top['rewrite_module']}",
    }

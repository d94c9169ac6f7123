"""The paper's rule (method.md, Where to tune): which of the measured sites to use, and why, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

ENOUGH = 0.99  # reliability that a site must reach
TIE = 0.005  # capabilities closer than this to the best one count as equal: no test set tells them apart
SHIELDS = ("capability", "locality_agreement")  # what stands for general ability, the first that was measured

FIGURES = ("reliability", "generalization", "locality", "locality_agreement", "capability")

Line = Mapping[str, Any]


def measured(lines: Sequence[Line]) -> list[Line]:
    """Those of the sites whose edit did not fail."""
    return [line for line in lines if line["reliability"] is not None]


def worth_showing(lines: Sequence[Line]) -> list[str]:
    """The figures that were measured, without one that is the same as another everywhere."""
    kept = [key for key in FIGURES if any(line[key] is not None for line in lines)]
    same = all(line["locality"] == line["locality_agreement"] for line in lines)
    return [key for key in kept if not (same and key == "locality_agreement" and "locality" in kept)]


def shield_of(lines: Sequence[Line]) -> str | None:
    """Which figure stands for general ability; None where none was measured."""
    return next((s for s in SHIELDS if any(line[s] is not None for line in lines)), None)


def best(lines: Sequence[Line]) -> Line:
    """Among the sites with reliability >= ENOUGH (else: of the highest reliability) those of the highest
    capability, and among these the one that generalizes best; then fewer other answers changed, fewer
    parameters, a later layer. Raises FloatingPointError when every edit failed."""
    known = measured(lines)
    if not known:
        raise FloatingPointError("the loss was not finite at any site: a smaller lr would be right")
    highest = max(line["reliability"] for line in known)
    known = [line for line in known if line["reliability"] >= min(ENOUGH, highest)]
    shield = shield_of(known)
    if shield is not None:
        top = max(line[shield] for line in known)
        known = [line for line in known if line[shield] >= top - TIE]
    of = lambda line, key: -1.0 if key is None or line[key] is None else line[key]  # noqa: E731
    return max(
        known,
        key=lambda line: (
            of(line, "generalization"),
            of(line, shield),
            of(line, "locality_agreement"),
            -line["parameters"],
            line["layer"],
        ),
    )


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
    top = best(lines)
    return {
        "layer": top["layer"],
        "module": top["module"],
        "rewrite_module": top["rewrite_module"],
        "words": words(lines, before),
        "config": f"layer: {top['layer']}\nrewrite_module: {top['rewrite_module']}",
    }


def words(lines: Sequence[Line], before: Mapping[str, float | None]) -> str:
    """Why it is this site, with the numbers."""
    top, known = best(lines), measured(lines)
    good = [line for line in known if line["reliability"] >= ENOUGH]
    said = [f"{top['module']} of layer {top['layer']}."]
    if good:
        said.append(f"{len(good)} of {len(lines)} sites reach a reliability of {_percent(ENOUGH)}.")
    else:
        said.append(
            f"No site of {len(lines)} reaches a reliability of {_percent(ENOUGH)}, so the highest decides: "
            f"{_percent(top['reliability'])} here. More epochs, a larger lr or fewer edits would be right."
        )
        good = [line for line in known if line["reliability"] == top["reliability"]]
    shield = shield_of(good)
    if shield is None:
        said.append("Neither capability nor locality was measured: generalization alone decides.")
        near = good
    else:
        if shield != "capability":
            said.append("Capability was not measured (capability_data): locality_agreement stands in for it.")
        highest = max(line[shield] for line in good)
        near = [line for line in good if line[shield] >= highest - TIE]
        was = "" if before.get(shield) is None else f", {_percent(before[shield])} before the edit"
        said.append(
            f"{shield.capitalize()} comes first: the highest of these is {_percent(highest)}{was}; "
            f"{len(near)} of them come within {100 * TIE:g} points of it."
        )
    if top["generalization"] is not None:
        rate = _percent(top["generalization"])
        said.append(
            f"Of these it generalizes best: {rate}." if len(near) > 1 else f"It generalizes to {rate}."
        )
    rest = (f"{key} {_percent(top[key])}" for key in worth_showing(lines) if top[key] is not None)
    said.append(f"Its figures: {', '.join(rest)}.")
    failed = len(lines) - len(known)
    if failed:
        said.append(f"At {failed} sites the loss was not finite: they are left out.")
    return " ".join(said)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

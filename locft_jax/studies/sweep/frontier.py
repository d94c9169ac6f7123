"""How much a method keeps of what was not edited, against how well it edits: the frontier of a sweep over
`preserve...` keys, plain LocFT-BF among the rest, and the settings to use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.rules import shown as yaml
from locft_jax.studies.locate.rule import ENOUGH
from locft_jax.studies.tables import Line, describe_figures, label

PRESERVING = ("preserve", "preserve_data", "preserve_kl", "preserve_strength", "preserve_tokens")


def measured(rows: Sequence[Line]) -> list[Line]:
    """Those of the rows that edits and other answers are known of."""
    return [row for row in rows if row["reliability"] is not None and row["locality_agreement"] is not None]


def is_frontier(rows: Sequence[Line]) -> bool:
    """Whether a sweep compares how other knowledge is kept: it varies a `preserve...` key, and asked other
    facts."""
    return len(rows) > 1 and any(key in rows[0]["settings"] for key in PRESERVING) and any(measured(rows))


def method_of(settings: Mapping[str, Any]) -> str:
    """What keeps other knowledge in these settings, without how strongly: `plain`, `soft`, `KL`, `soft + KL`,
    with the source of its texts if there is one."""
    own = settings.get("preserve", "none")
    parts = [*([] if own in ("none", None) else [own]), *(["KL"] if settings.get("preserve_kl") else [])]
    source = settings.get("preserve_data")
    last = ", last tokens" if settings.get("preserve_tokens") == "last" else ""
    return (" + ".join(parts) + (f", {Path(source).name}" if source else "") + last) if parts else "plain"


def pick(rows: Sequence[Line]) -> Line:
    """Of the rows with reliability >= ENOUGH (else: of the highest reliability) the one that changes fewest
    of the other answers; then the one that generalizes best."""
    known = measured(rows)
    highest = max(row["reliability"] for row in known)
    good = [row for row in known if row["reliability"] >= min(ENOUGH, highest)]
    return max(good, key=lambda row: (row["locality_agreement"], row["generalization"] or 0.0))


def recommend(rows: Sequence[Line]) -> dict[str, Any]:
    """The settings to use: {"settings", "words", "config"}; the words compare them with plain LocFT-BF."""
    top, plain = pick(rows), [row for row in measured(rows) if method_of(row["settings"]) == "plain"]
    said = [top, *([pick(plain)] if plain and method_of(top["settings"]) != "plain" else [])]
    words = "; plain at its best: ".join(f"{label(r['settings'])}: {describe_figures(r)}" for r in said)
    config = "\n".join(f"{key}: {yaml(value)}" for key, value in top["settings"].items())
    return {"settings": top["settings"], "words": words, "config": config}

"""The model card: the section of README.md in an exported model that says what was edited, and how.

A delta carries its cards, so that `apply` writes the README of the run's own `hf/`, and `revert` gives back
the base's: its bytes where there was one (its front matter, and so its licence, stays first), none where the
card made the file.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.errors import printable
from locft_jax.evaluation.report import ROWS
from locft_jax.io.delta import Delta
from locft_jax.io.hf_folder import HFFolder
from locft_jax.version import __version__

README = "README.md"
# What stands before a card: in a file that was there, and in one that the card makes.
BELOW = "\n\n<!-- locft-jax: an edit of the model above -->\n\n"
ALONE = """\
---
library_name: transformers
tags:
- model-editing
---
<!-- locft-jax: this file was made by an edit -->

"""
KEYS = ("layer", "rewrite_module", "learning_rate", "batch_size", "num_epochs", "loss_average", "loss_floor",
        "weight_decay", "norm_constraint", "append_eos", "chat_template", "weights", "preserve",
        "preserve_strength", "preserve_kl", "augment_prefixes", "augment_rephrases", "seed")  # fmt: skip
SHOWN = 12  # tensors that a card lists


def make_card(name: str, report: Mapping[str, Any], delta: Delta) -> str:
    """A card in Markdown of an edit with this delta. `name`: the base model's; `report`: the fields of
    report.json, rates 0-1 or None. Neither prompts nor paths stand in it, and no name can break it."""
    tensors = sorted(delta.new)
    more = f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
    settings = {key: report["config"][key] for key in KEYS if report["config"].get(key) is not None}
    rows = {
        "base model": code(name),
        "its fingerprint": f"{code(delta.metadata['fingerprint'])} (names, dtypes and shapes of all tensors, "
        "and the edited ones' bytes before the edit)",
        "edited tensors": ", ".join(map(code, tensors[:SHOWN])) + more,
        "parameters in them": f"{sum(a.size for a in delta.new.values()):,}",
        "edits": f"{report['edits']:,} (sha256 of the data {code(report['data_sha256'])})",
        "method": f"LocFT-BF: {code(report['method'])}, pipeline {code(report['pipeline'])}, "
        f"{report['epochs_run']:,} epochs, {report['steps_run']:,} steps, "
        f"stopped by {code(report['stopped'])}",
        "settings": ", ".join(code(f"{key}={json.dumps(value)}") for key, value in settings.items()),
        "made by": f"locft-jax {__version__}",
    }
    if report["conflicts"]:
        rows["prompts with several targets"] = f"{report['conflicts']:,}: not all of their edits can hold"
    figures = [
        f"| {key}: {meaning} | {_rate(report['before'], key)} | {_rate(report['after'], key)} |"
        for key, meaning in ROWS
    ]
    return "\n".join(
        [
            f"## An edit of {code(name)}",
            "",
            "Facts were edited into this model by fine-tuning the tensors named below (Fine-tuning Done "
            "Right in Model Editing, arXiv 2509.22072). Every other tensor has the base model's bytes.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "| figure | before | after |",
            "| --- | --- | --- |",
            *figures,
            "",
            "Greedy answers of at most 32 tokens, normalized and compared with the expected ones; all "
            "stand in the run's `predictions.jsonl`.",
            "",
            "The run's `delta.safetensors` holds the edited tensors, new and old. It makes the base model of "
            "this one:",
            "",
            "```",
            "python -m locft_jax.delta revert delta.safetensors --model EDITED_FOLDER --out BASE_FOLDER",
            "```",
            "",
        ]
    )


def _rate(figures: Mapping[str, float | None], key: str) -> str:
    if key not in figures:
        return "-"
    value = figures[key]
    return "not measured" if value is None else f"{100 * value:.1f} %"


def code(text: str) -> str:
    """Any text as a code span in a table's cell: shown as it is, on one line."""
    text = " ".join(printable(text).split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def model_name(checkpoint: HFFolder, path_or_id: str) -> str:
    """What a card calls a model: its Hub id, or the name of its folder."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_id) and not os.path.isdir(path_or_id):
        return path_or_id
    return checkpoint.name if checkpoint.name not in ("", "..") else checkpoint.path.resolve().name


# ---------------------------------------------------------------- in and out of README.md


def readme(folder: Path, cards: Sequence[str], revert: bool = False) -> dict[str, bytes | None]:
    """What README.md of a model folder becomes when the edits of these cards are made, or taken back:
    {name: bytes, or None for no such file}; {} where it stays as it is."""
    path = folder / README
    before = text = path.read_bytes() if path.is_file() else None
    for card in reversed(cards) if revert else cards:
        text = without_card(text, card) if revert else with_card(text, card)
    return {} if text == before else {README: text}


def with_card(text: bytes | None, card: str) -> bytes:
    return (ALONE + card).encode() if text is None else text + (BELOW + card).encode()


def without_card(text: bytes | None, card: str) -> bytes | None:
    """`with_card` undone, also where other cards follow; a text without this card stays as it is."""
    below, alone = (BELOW + card).encode(), (ALONE + card).encode()
    if text is None or text == alone:
        return None
    if text.startswith(alone + BELOW.encode()):
        return ALONE.encode() + text[len(alone + BELOW.encode()) :]
    before, found, after = text.rpartition(below)
    return before + after if found else text

"""The model card of an edited model: a section of README.md that says what was edited and how, and
`base_model` and `model-index` in the README's front matter.

A delta carries its cards, so that `apply` writes the README of the run's own `hf/`. A card is inserted with
marks, and what it replaces in the front matter is commented out with its mark: so `revert` gives back the
base's bytes, also where other cards were added before or after it, and no README where the card made it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from locft_jax.errors import printable
from locft_jax.io.delta import Delta
from locft_jax.io.hf_folder import HFFolder
from locft_jax.version import __version__

README = "README.md"
BELOW = b"\n\n<!-- locft-jax: an edit of the model above -->\n\n"
ALONE = b"<!-- locft-jax: this file was made by an edit -->\n\n"
NEW = b"---\nlibrary_name: transformers\ntags:\n- model-editing\n---\n" + ALONE  # a README where none was
KEYS = ("layer", "rewrite_module", "learning_rate", "batch_size", "num_epochs", "loss_average", "loss_floor",
        "weight_decay", "norm_constraint", "append_eos", "chat_template", "weights", "preserve",
        "preserve_strength", "preserve_kl", "augment_prefixes", "augment_rephrases", "seed")  # fmt: skip
SHOWN = 12  # tensors that a card lists
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

CARD = """\
## An edit of {name}

Facts were edited into this model by fine-tuning the tensors named below (Fine-tuning Done Right in Model \
Editing, arXiv 2509.22072). Every other tensor has the base model's bytes.

| | |
| --- | --- |
{facts}

| figure | before | after |
| --- | --- | --- |
{figures}

Greedy answers of at most 32 tokens, normalized and compared with the expected ones; the run's \
`predictions.jsonl` has them all. Its `delta.safetensors` holds the edited tensors, new and old, and makes \
the base model of this one:

```
python -m locft_jax.delta revert delta.safetensors --model EDITED_FOLDER --out BASE_FOLDER
```
"""


def make_card(name: str, report: Mapping[str, Any], delta: Delta, figures: Sequence[tuple[str, str]]) -> str:
    """A card of an edit with this delta: front matter and Markdown. It holds no prompts and no paths, and no
    name can break it.

    Args:
        name: the base model's Hub id, or the name of its folder.
        report: the fields of report.json, rates 0-1 or None.
        delta: what was edited.
        figures: the rates to list, (key, meaning).
    """
    tensors, config = sorted(delta.new), report["config"]
    more = f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
    settings = [code(f"{key}={json.dumps(config[key])}") for key in KEYS if config.get(key) is not None]
    facts = {
        "base model": code(name),
        "its fingerprint": f"{code(delta.metadata['fingerprint'])} (names, dtypes and shapes of all tensors, "
        "and the edited ones' bytes before the edit)",
        "edited tensors": ", ".join(map(code, tensors[:SHOWN])) + more,
        "parameters in them": f"{sum(a.size for a in delta.new.values()):,}",
        "edits": f"{report['edits']:,} (sha256 of the data {code(report['data_sha256'])})",
        "method": f"LocFT-BF: {code(report['method'])}, pipeline {code(report['pipeline'])}, "
        f"{report['epochs_run']:,} epochs, {report['steps_run']:,} steps, "
        f"stopped by {code(report['stopped'])}",
        "settings": ", ".join(settings),
        "made by": f"locft-jax {__version__}",
    }
    if report["conflicts"]:
        facts["prompts with several targets"] = f"{report['conflicts']:,}: not all of their edits can hold"
    return _front_matter(name, report, figures) + CARD.format(
        name=code(name),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        figures="\n".join(
            f"| {key}: {meaning} | {_rate(report['before'], key)} | {_rate(report['after'], key)} |"
            for key, meaning in figures
        ),
    )


def _front_matter(name: str, report: Mapping[str, Any], figures: Sequence[tuple[str, str]]) -> str:
    """What the Hub reads: the base model, if it has a Hub id, and the figures after the edit."""
    data = f"{report['edits']} edits (sha256 {report['data_sha256']})"
    measured = [
        EvalResult("text-generation", "custom", data, metric_type=key, metric_name=meaning, metric_value=rate)
        for key, meaning in figures
        if (rate := report["after"].get(key)) is not None
    ]
    keys: dict[str, Any] = {"base_model": name} if HUB_ID.fullmatch(name) else {}
    if measured:
        keys["model-index"] = eval_results_to_model_index(f"an edit of {_plain(name)}", measured)
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n" if keys else ""


def _rate(figures: Mapping[str, float | None], key: str) -> str:
    value = figures.get(key)
    return f"{100 * value:.1f} %" if value is not None else "not measured" if key in figures else "-"


def _plain(text: str) -> str:
    """Any text on one line, without control characters."""
    return " ".join(printable(text).split())


def code(text: str) -> str:
    """Any text as a code span in a table's cell: shown as it is, on one line."""
    text = _plain(text).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def model_name(folder: HFFolder, path_or_id: str) -> str:
    """What a card calls a model: its Hub id, or the name of its folder."""
    if HUB_ID.fullmatch(path_or_id) and not os.path.isdir(path_or_id):
        return path_or_id
    return folder.name if folder.name not in ("", "..") else folder.path.resolve().name


def readme(folder: Path, cards: Sequence[str], revert: bool = False) -> dict[str, bytes | None]:
    """What README.md of a model folder becomes when the edits of these cards are made, or reverted:
    {name: bytes, or None for no such file}; {} where it stays as it is."""
    before = text = (folder / README).read_bytes() if (folder / README).is_file() else None
    for card in reversed(cards) if revert else cards:
        text = without_card(text, card) if revert else with_card(text, card)
    return {} if text == before else {README: text}


def with_card(text: bytes | None, card: str) -> bytes:
    """A README with a card in it; None stands for no file."""
    mark, front, body = _parts(card)
    text = NEW if text is None else text
    below = b"" if text.endswith(ALONE) else BELOW
    return _with_front_matter(text, mark, front) + below + body


def without_card(text: bytes | None, card: str) -> bytes | None:
    """`with_card` undone, also where other cards follow; a text without this card stays as it is."""
    mark, front, body = _parts(card)
    left = text or b""
    for own, rest in ((ALONE + body + BELOW, ALONE), (ALONE + body, ALONE), (BELOW + body, b"")):
        if own in left:
            left = rest.join(left.rsplit(own, 1))
            break
    left = _without_front_matter(left, mark, front)
    return None if text is None or left == NEW else left


def _parts(card: str) -> tuple[bytes, bytes, bytes]:
    """A card's mark, front matter (none in a card of version 0.1) and text."""
    front, body = card[4:].split("\n---\n", 1) if card.startswith("---\n") else ("", card)
    mark = f"# locft-jax {hashlib.sha256(card.encode()).hexdigest()[:12]}: "
    return mark.encode(), f"{front}\n".encode() if front else b"", body.encode()


FRONT = re.compile(rb"\A---\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
MARK = re.compile(rb"# locft-jax [0-9a-f]{12}: ")
# The keys of front matter that cards set, with the lines of their values.
OWN = re.compile(rb"^(?:base_model|model-index)[ \t]*:.*\n(?:[ \t#-].*\n|\r?\n)*", re.MULTILINE)


def _comment(lines: bytes, mark: bytes) -> bytes:
    return re.sub(rb"(?m)^(?=.)", mark, lines)


def _with_front_matter(text: bytes, mark: bytes, front: bytes) -> bytes:
    """A README whose front matter ends with these lines, the keys in them commented out above. Front matter
    that is not plain YAML stays as it is."""
    found = FRONT.match(text)
    if front and not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"---"):
        return b"---\n" + mark + b"\n" + front + b"---\n" + text
    if not front or not found or not found[1]:
        return text
    above = OWN.sub(lambda m: _comment(m[0], mark), found[1])
    try:
        old, rest, own = (yaml.safe_load(part) or {} for part in (found[1], above, front))
        if rest.keys() & own.keys() or yaml.safe_load(above + front) != {**old, **own}:
            return text
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return text
    return text[: found.start(1)] + above + mark + b"\n" + front + text[found.end(1) :]


def _without_front_matter(text: bytes, mark: bytes, front: bytes) -> bytes:
    """`_with_front_matter` undone. Where a later card has commented these lines out, what they had commented
    out is now commented out by that card."""
    found = FRONT.match(text)
    if not front or not found:
        return text
    for later in (b"", *MARK.findall(found[1])):
        own = mark + b"\n" + _comment(front, later)
        if own in found[1]:
            left = found[1].replace(own, b"").replace(mark, later)
            return text[: found.start(1)] + left + text[found.end(1) :] if left else text[found.end() + 1 :]
    return text

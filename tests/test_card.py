"""The model card of an export: what it says, what it keeps to itself, and that no name breaks it."""

import json
import re

import pytest

from locft_jax.io import model_card
from locft_jax.io.delta import load_delta


@pytest.fixture(scope="module")
def report(edit_run):
    return json.loads((edit_run / "report.json").read_text())


@pytest.fixture(scope="module")
def delta(edit_run):
    return load_delta(edit_run / "delta.safetensors")


def cells(text: str) -> dict[str, list[str]]:
    """{first cell of a table's row: the others}; a pipe with a backslash divides no cells."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_card_says_what_was_edited_how_and_how_well(edit_run, report, delta, tiny_model_dir):
    text = (edit_run / "hf" / "README.md").read_text()
    rows = cells(text)
    assert rows["base model"] == [f"`{tiny_model_dir.name}`"]
    assert rows["its fingerprint"][0].startswith(f"`{report['fingerprint']}`")
    assert rows["edited tensors"] == [", ".join(f"`{n}`" for n in sorted(delta.new))]
    assert rows["parameters in them"] == ["6,144"] and rows["edits"][0].startswith("12 (sha256")
    assert "`ft-m`, pipeline `breadth`" in rows["method"][0]
    assert all(
        f"`{said}`" in rows["settings"][0]
        for said in ("learning_rate=0.01", "layer=2", "batch_size=5", "seed=0")
    )
    for key in ("reliability", "generalization", "locality", "capability"):
        (got,) = (row for name, row in rows.items() if name.startswith(f"{key}:"))
        assert got == [f"{100 * report[when][key]:.1f} %" for when in ("before", "after")]
    (agreement,) = (row for name, row in rows.items() if name.startswith("locality_agreement"))
    assert agreement == ["-", f"{100 * report['after']['locality_agreement']:.1f} %"]
    assert "locft_jax.delta revert delta.safetensors --model" in text
    assert text.startswith("---\nlibrary_name: transformers\n")  # front matter, as the Hub wants it


def test_no_path_and_no_prompt_stands_in_it(edit_run, report, tiny_model_dir, edits_file):
    text = (edit_run / "hf" / "README.md").read_text()
    secret = [str(tiny_model_dir.parent), str(edit_run.parent), str(edits_file), edits_file.name]
    prompts = [json.loads(line)["prompt"] for line in (edit_run / "edits.jsonl").read_text().splitlines()]
    assert len(prompts) == 12 and not [s for s in secret + prompts if s in text]


def test_what_was_not_measured_is_said(report, delta):
    nothing = {**report, "before": dict.fromkeys(report["before"]), "after": dict.fromkeys(report["after"])}
    rows = cells(model_card.make_card("m", {**nothing, "conflicts": 3}, delta))
    figures = [row for name, row in rows.items() if name.startswith(("reliability", "capability"))]
    assert figures == [["not measured"] * 2] * 2
    assert rows["prompts with several targets"][0].startswith("3: ")


HOSTILE = ["a|b", "a`b``c", "`", "-->", "<script>", "line\nbreak", "\x1b[2J", "[x](y)", "", "\ud800"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_it(report, delta, name):
    plain = model_card.make_card("m", report, delta)
    text = model_card.make_card(name, report, delta)
    assert len(text.splitlines()) == len(plain.splitlines()) and text.isprintable() is False
    assert all(c.isprintable() or c == "\n" for c in text) and text.encode()
    rows, wanted = cells(text), cells(plain)
    assert list(rows) == list(wanted)
    span = rows.pop("base model")[0]
    assert wanted.pop("base model") and rows == wanted
    fence = re.match("`+", span)[0]
    inner = span[len(fence) : -len(fence)]
    assert span.endswith(fence) and fence not in inner and inner and inner[0] != "`" != inner[-1]


def test_a_model_is_called_by_its_name(tiny_model_dir, monkeypatch):
    from locft_jax.io.hf_folder import open_folder

    checkpoint = open_folder(str(tiny_model_dir))
    name = tiny_model_dir.name
    assert model_card.model_name(checkpoint, str(tiny_model_dir)) == name
    assert model_card.model_name(checkpoint, "owner/name") == "owner/name"  # from the Hub
    monkeypatch.chdir(tiny_model_dir.parent.parent)
    assert model_card.model_name(checkpoint, f"{tiny_model_dir.parent.name}/{name}") == name  # a folder
    monkeypatch.chdir(tiny_model_dir)
    assert model_card.model_name(open_folder("."), ".") == name

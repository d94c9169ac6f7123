"""The model card of an export: what it says, what it keeps to itself, and that no name breaks it."""

import itertools
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from locft_jax.evaluation.report import ROWS
from locft_jax.io import model_card
from locft_jax.io.delta import load_delta
from locft_jax.io.hf_folder import open_folder


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
    assert text.startswith("---\nlibrary_name: transformers\n")
    card = ModelCard(text)  # as the Hub reads its front matter
    assert card.data.library_name == "transformers" and card.data.tags == ["model-editing"]
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown == {k: v for k, _ in ROWS if (v := report["after"].get(k)) is not None} and len(shown) > 4
    assert card.data.model_name == f"an edit of {tiny_model_dir.name}"
    assert card.data.base_model is None  # the name of a folder is no Hub id


def test_no_path_and_no_prompt_stands_in_it(edit_run, report, tiny_model_dir, edits_file):
    text = (edit_run / "hf" / "README.md").read_text()
    secret = [str(tiny_model_dir.parent), str(edit_run.parent), str(edits_file), edits_file.name]
    prompts = [json.loads(line)["prompt"] for line in (edit_run / "edits.jsonl").read_text().splitlines()]
    assert len(prompts) == 12 and not [s for s in secret + prompts if s in text]


def test_what_was_not_measured_is_said(report, delta):
    nothing = {**report, "before": dict.fromkeys(report["before"]), "after": dict.fromkeys(report["after"])}
    rows = cells(model_card.make_card("m", {**nothing, "conflicts": 3}, delta, ROWS))
    figures = [row for name, row in rows.items() if name.startswith(("reliability", "capability"))]
    assert figures == [["not measured"] * 2] * 2
    assert rows["prompts with several targets"][0].startswith("3: ")


HOSTILE = ["a|b", "a`b``c", "`", "-->", "<script>", "line\nbreak", "\x1b[2J", "[x](y)", "", "\ud800"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_it(report, delta, name):
    plain = model_card.make_card("m", report, delta, ROWS)
    text = model_card.make_card(name, report, delta, ROWS)
    assert len(text.splitlines()) == len(plain.splitlines()) and text.isprintable() is False
    assert all(c.isprintable() or c == "\n" for c in text) and text.encode()
    rows, wanted = cells(text), cells(plain)
    assert list(rows) == list(wanted)
    span = rows.pop("base model")[0]
    assert wanted.pop("base model") and rows == wanted
    assert ModelCard(text).data.model_name
    fence = re.match("`+", span)[0]
    inner = span[len(fence) : -len(fence)]
    assert span.endswith(fence) and fence not in inner and inner and inner[0] != "`" != inner[-1]


def test_a_model_is_called_by_its_name(tiny_model_dir, monkeypatch):
    checkpoint = open_folder(str(tiny_model_dir))
    name = tiny_model_dir.name
    assert model_card.model_name(checkpoint, str(tiny_model_dir)) == name
    assert model_card.model_name(checkpoint, "owner/name") == "owner/name"  # from the Hub
    monkeypatch.chdir(tiny_model_dir.parent.parent)
    assert model_card.model_name(checkpoint, f"{tiny_model_dir.parent.name}/{name}") == name  # a folder
    monkeypatch.chdir(tiny_model_dir)
    assert model_card.model_name(open_folder("."), ".") == name


# ---------------------------------------------------------------- in and out of a README


def test_the_base_is_linked_where_it_has_a_hub_id(report, delta):
    text = model_card.with_card(None, model_card.make_card("owner/name", report, delta, ROWS)).decode()
    assert ModelCard(text).data.base_model == "owner/name"


INDEX = "model-index:\n- name: it\n  results: []\n"
READMES = {
    "none": None,
    "empty": b"",
    "no-front-matter": b"# Tiny\n\n---\nA rule above.\n---\n",
    "license": b"---\nlicense: mit\n---\n# Tiny\n",
    "windows": b"---\r\nlicense: other\r\nbase_model: a/b\r\n---\r\nno line end, Latin-1: \xe9",
    "both-keys": f"---\nbase_model:\n- a/b\n\n# why\nlicense: mit\n{INDEX}tags: [x]\n---\nText\n".encode(),
    "edited-before": b"---\n# locft-jax 000000000000: base_model: a/b\nbase_model: c/d\n---\nText\n",
}
STAY = {  # what no line can be added to
    "empty-front-matter": b"---\n---\nText\n",
    "flow": b"---\n{license: mit}\n---\nText\n",
    "quoted-key": b'---\n"base_model": a/b\n---\nText\n',
    "no-yaml": b"---\nlicense: [\n---\nText\n",
    "latin-1": b"---\nlicense: \xe9\n---\nText\n",
    "no-object": b"---\nlicense\n---\nText\n",
    "open": b"---\nlicense: mit\n",
    "indented": b"\n---\nlicense: mit\n---\nText\n",
}


def front(text: bytes) -> dict:
    return yaml.safe_load(re.match(rb"---\r?\n(.*?)^---\r?$", text, re.DOTALL | re.MULTILINE)[1])


@pytest.mark.parametrize("name", READMES)
def test_cards_come_and_go_in_any_order_and_leave_the_bytes(report, delta, name):
    base = READMES[name]
    cards = [model_card.make_card(f"owner/{i}", {**report, "edits": i}, delta, ROWS) for i in range(3)]
    cards[1] = cards[1].split("\n---\n", 1)[1]  # as version 0.1 wrote them
    text = base
    for card in cards:
        text = model_card.with_card(text, card)
    before = front(base) if base and name not in ("no-front-matter",) else {}
    for key, value in front(text).items():
        assert value == before.get(key, value) or key in ("base_model", "model-index")
    made = {"library_name", "tags"} if base is None else set()
    assert front(text).keys() == before.keys() | front(cards[2].encode()).keys() | made
    assert front(text)["base_model"] == "owner/2" and "2 edits" in str(front(text)["model-index"])
    assert ModelCard(text.decode(errors="replace")).data.base_model == "owner/2"
    for order in itertools.permutations(cards):
        left = text
        for card in order:
            left = model_card.without_card(left, card)
            if left and left != base and left.startswith(b"---"):  # readable at every stage, no key twice
                assert front(left) and left.count(b"\nbase_model:") <= 1
        assert left == base
    assert model_card.without_card(base, cards[0]) == base  # nothing to take out


@pytest.mark.parametrize("name", STAY)
def test_front_matter_that_cannot_be_merged_stays(report, delta, name):
    card = model_card.make_card("owner/name", report, delta, ROWS)
    text = model_card.with_card(STAY[name], card)
    assert text.startswith(STAY[name]) and b"## An edit of `owner/name`" in text
    assert model_card.without_card(text, card) == STAY[name]


def test_front_matter_that_was_changed_meanwhile_stays(report, delta):
    card = model_card.make_card("owner/name", report, delta, ROWS)
    text = model_card.with_card(READMES["license"], card).replace(b"model: owner/name", b"model: mine")
    left = model_card.without_card(text, card)
    assert b"license: mit" in left and b"base_model: mine" in left and b"An edit of" not in left

"""The stop rule and the scorer of the "WILD" protocol, and the rates that a report gives."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft_jax.data.packing import corpus_from_lists
from locft_jax.evaluation.probes import Answers, Probe, Questions
from locft_jax.evaluation.scoring import (
    agreement,
    by_batch,
    correct,
    counts,
    cut,
    figures,
    matches,
    may_match,
    normalize,
    predictions,
    rate,
    stop_tables,
    unreachable,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  an  apple\ta\nday ", "apple day"),
        ("U.S.A.", "usa"),
        ("Mira's (old) firm!", "miras old firm"),
        ("theatre Anna a-b", "theatre anna ab"),  # articles are whole words
        ("a the an", ""),
        ("a.", ""),  # punctuation goes first: the rest is an article
        ("«Œuvre» — Ö", "«œuvre» — ö"),  # ASCII punctuation only, as in the official scorer
        ("", ""),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


@given(st.text())
def test_an_article_in_front_changes_nothing(text):
    assert normalize("The " + text) == normalize(text) == normalize(f" {text}\n")


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        (" Vintown", "vintown", True),
        ("the Vintown!", "Vintown", True),
        ("Vintown in Oredal", "Vintown", False),  # not a prefix match
        ("Vin town", "Vintown", False),
        ("", "Vintown", False),
    ],
)
def test_matches(answer, target, right):
    assert matches(answer, target) is right


@pytest.mark.parametrize(
    ("begun", "target", "may"),
    [
        (" St.", "St. Vintown", True),
        (" Vintown.", "Vintown", True),
        (" Vint", "Vintown", True),
        (" the", "Vintown", True),  # an article, if it ends here
        (" then", "Vintown", False),
        (" Oredal.", "Vintown", False),
        (" Vintown. And more.", "Vintown", False),
        (" Vintown. And", "Vintown", False),
        (" Vintown. A", "Vintown", True),
        (" Mira Or", "Mira Halver", False),
        (" Mira\n", "Mira Halver", True),
        ("", "Vintown", True),
    ],
)
def test_may_match(begun, target, may):
    assert may_match(begun, target) is may


ENDINGS = st.text(st.sampled_from("aAnteh .,-–\n\u00e9\u03a3\u0130_"), max_size=12)


@given(st.data())
def test_every_beginning_of_a_match_may_match(data):
    text = data.draw(ENDINGS)
    target = data.draw(st.sampled_from([text, normalize(text), f"The {text}!", text.lower()]))
    begun = text[: data.draw(st.integers(0, len(text)))]
    assert may_match(begun, target) or not matches(text, target)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Vintown. It is", "Vintown"),
        ("Vintown\nQ:", "Vintown"),
        ("\nVintown", ""),
        ("Vintown", "Vintown"),
        (".", ""),
        ("3.5 %", "3"),
        ("", ""),
    ],
)
def test_cut(text, answer):
    assert cut(text) == answer


@pytest.mark.parametrize(
    ("target", "never"),
    [
        ("Vintown", False),
        ("Vintown.", False),  # the stop comes when all is said
        ("Vintown.\n", False),
        ("Dr. Orvik", True),
        ("St. Mary.", True),
        ("J. R. R.", True),
        ("line one\nline two", True),
        (".net", True),
        ("...", False),  # an answer without a word matches it
        ("a. b", True),
    ],
)
def test_unreachable(target, never):
    assert unreachable(target) is never
    assert unreachable(" " + target) is never


# ---------------------------------------------------------------- stop tables


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def test_stop_tables_of_byte_level_bpe(make_tokenizer, tmp_path):
    texts = ["He said so.\nThen... he left. Then it was 3.5.\n\n"] * 9
    tokenizer = load(make_tokenizer(tmp_path, texts))
    official, eos_only = stop_tables(tokenizer, 330, (0, 7, 400))
    # In its vocabulary a byte-level tokenizer writes a newline as this letter.
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    expected = {i for i, piece in pieces.items() if "." in piece or "Ċ" in piece}
    assert any(len(pieces[i]) > 1 for i in expected)  # such as "..."
    assert set(np.flatnonzero(official)) == expected | {0, 7}
    assert set(np.flatnonzero(eos_only)) == {0, 7}  # an id beyond the vocabulary cannot come up
    assert official.shape == eos_only.shape == (330,) and official.dtype == bool


def test_stop_tables_of_a_byte_fallback_tokenizer(shared_data):
    tokenizer = load(shared_data / "stories260K")
    official, eos_only = stop_tables(tokenizer, 512, (1,))
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    expected = {i for i, piece in pieces.items() if "." in piece or "\n" in piece}
    expected |= {i for i, piece in pieces.items() if piece in ("<0x0A>", "<0x2E>")}
    assert set(np.flatnonzero(official)) == expected | {1}
    assert set(np.flatnonzero(eos_only)) == {1}
    assert len(expected) >= 3 and {pieces[i] for i in expected} >= {"<0x0A>", "<0x2E>", "."}


def test_more_tokens_than_the_model_has_rows(tiny_tokenizer_dir):
    """Some checkpoints cut the vocabulary; such ids can never be generated."""
    official, _ = stop_tables(load(tiny_tokenizer_dir), 100, (0,))
    assert official.shape == (100,) and official[0]


# ---------------------------------------------------------------- rates

PROBES = [
    Probe("0", "reliability", "The capital of Oredal is", "Vintown"),
    Probe("1", "reliability", "Who founded the firm?", "Mira Halver"),
    Probe("0", "generalization", "Oredal's capital is", "Vintown"),
    Probe("0", "locality", "Hana works as", "a baker"),
    Probe("0", "locality", "Ten plus five is", None),
    Probe("1", "locality", "Ten minus five is", None),
    Probe("1", "portability", "The founder was born in", "Vintown"),
    Probe("sums", "capability", "Ten plus five is", "15"),
    Probe("sums", "capability", "Ten minus five is", "5"),
    Probe("places", "capability", "Hana was born in", "Vintown"),
]


NOTHING = corpus_from_lists([], [])
QUESTIONS = Questions(PROBES, [[1]] * len(PROBES), [[2]] * len(PROBES), {}, NOTHING)


def answers(*texts: str, full: list[str] | None = None) -> Answers:
    return Answers(list(texts), full or list(texts), [[100 + i] for i in range(len(texts))], 0)


AFTER = answers(
    "Vintown", "Mira", "the vintown!", "baker", "15", "six", "Oredal", "15", "4", "Vintown",
    full=["Vintown. And so on", "Mira", "x", "x", "x", "x", "x", "x", "x", "x"],
)  # fmt: skip
BEFORE = answers("?", "?", "?", "baker", "15 ", "five", "?", "15", "5", "Vintown")


def test_rate():
    assert rate([True, False, True, True]) == 0.75
    assert rate([]) is None and rate(np.zeros(3, bool)) == 0.0


def test_figures_by_kind_and_capability_by_task():
    assert figures(QUESTIONS, AFTER) == {
        "reliability": 0.5,
        "generalization": 1.0,
        "locality": 1.0,  # of the one probe whose answer is known
        "portability": 0.0,
        "reliability_eos_only": 0.0,  # the model runs on after the right answer
        "capability": 0.75,  # mean of sums (1 of 2) and places (1 of 1), not 2 of 3
    }


def test_figures_without_a_probe_are_null():
    nothing = Questions([], [], [], {}, NOTHING)
    assert set(figures(nothing, answers()).values()) == {None}
    assert agreement(nothing, answers(), answers()) is None
    assert counts(nothing) == {}


def test_correct_is_unknown_without_a_known_answer():
    assert correct(QUESTIONS, AFTER)[3:6] == [True, None, None]


def test_agreement_counts_changed_answers_of_locality_probes_only():
    assert agreement(QUESTIONS, BEFORE, AFTER) == pytest.approx(2 / 3)
    assert agreement(QUESTIONS, AFTER, AFTER) == 1.0


def test_counts():
    expected = {"reliability": 2, "generalization": 1, "locality": 3, "portability": 1, "capability": 3}
    assert counts(QUESTIONS) == expected


def test_rates_of_each_arrival():
    first, second = by_batch(QUESTIONS, AFTER, 2)
    assert first == {"reliability": 0.5, "generalization": 1.0}
    assert second == {"reliability": None, "generalization": None}
    later = [dataclasses.replace(p, batch=int(p.case == "1")) for p in PROBES]
    parts = by_batch(dataclasses.replace(QUESTIONS, probes=later), AFTER, 2)
    assert parts == [
        {"reliability": 1.0, "generalization": 1.0},
        {"reliability": 0.0, "generalization": None},
    ]


def test_lines_of_predictions():
    lines = predictions(QUESTIONS, BEFORE, AFTER)
    assert len(lines) == len(PROBES)
    assert lines[1] == {
        "case": "1",
        "probe": "reliability",
        "prompt": "Who founded the firm?",
        "target": "Mira Halver",
        "before": "?",
        "after": "Mira",
        "correct": False,
    }
    assert lines[4]["correct"] is None and lines[4]["target"] is None
    alone = predictions(QUESTIONS, None, AFTER)[0]
    assert (alone["before"], alone["after"], alone["correct"]) == (None, "Vintown", True)
    first = predictions(QUESTIONS, BEFORE, None)[0]
    assert (first["before"], first["after"], first["correct"]) == ("?", None, False)

"""Probes, the stop rule and the scorer of the "WILD" protocol."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft_jax.data.requests import EditRequest
from locft_jax.evaluation.probes import KINDS, Probe, make_probes
from locft_jax.evaluation.scoring import cut, matches, may_match, normalize, rate, stop_tables, unreachable


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


# ---------------------------------------------------------------- probes

REQUESTS = [
    EditRequest(
        case=f"c{i}",
        prompt=f"p{i}",
        target_new=f"t{i}",
        rephrases=(f"r{i}a", f"r{i}b"),
        locality=((f"l{i}", "known"), (f"m{i}", None)),
        portability=((f"q{i}", f"t{i}!"),),
    )
    for i in range(5)
]


def test_every_probe_of_every_request_in_order():
    probes = make_probes(REQUESTS[:1])
    assert probes == [
        Probe("c0", "reliability", "p0", "t0"),
        Probe("c0", "generalization", "r0a", "t0"),
        Probe("c0", "generalization", "r0b", "t0"),
        Probe("c0", "locality", "l0", "known"),
        Probe("c0", "locality", "m0", None),
        Probe("c0", "portability", "q0", "t0!"),
    ]
    assert len(make_probes(REQUESTS)) == 30 and make_probes([]) == []


def test_a_sample_is_seeded_and_of_each_kind():
    every = make_probes(REQUESTS)
    sample = make_probes(REQUESTS, 4, seed=1)
    assert sample == make_probes(REQUESTS, 4, seed=1) != make_probes(REQUESTS, 4, seed=2)
    assert {kind: sum(p.kind == kind for p in sample) for kind in KINDS} == dict.fromkeys(KINDS, 4)
    assert [every.index(p) for p in sample] == sorted(every.index(p) for p in sample)
    assert len(set(sample)) == 16
    assert make_probes(REQUESTS, 100) == every


def test_rate():
    assert rate([True, False, True, True]) == 0.75
    assert rate([]) is None and rate(np.zeros(3, bool)) == 0.0

"""From probes to figures: what is asked, how it is scored, what is written down."""

import dataclasses

import jax
import numpy as np
import pytest

from locft_jax import load_model
from locft_jax.data.capability import CapabilityItem
from locft_jax.evaluation import ask, probes, scoring, verify
from locft_jax.evaluation.probes import NEW_TOKENS, Answers, Asked, Probe
from locft_jax.model import decoder

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


def asked(choices=None) -> Asked:
    return Asked(PROBES, [[1]] * len(PROBES), [[10 + i] for i in range(len(PROBES))], choices or {})


def answers(*texts: str, full: list[str] | None = None) -> Answers:
    return Answers(list(texts), full or list(texts), [[100 + i] for i in range(len(texts))], 0)


AFTER = answers(
    "Vintown", "Mira", "the vintown!", "baker", "15", "six", "Oredal", "15", "4", "Vintown",
    full=["Vintown. And so on", "Mira", "x", "x", "x", "x", "x", "x", "x", "x"],
)  # fmt: skip
BEFORE = answers("?", "?", "?", "baker", "15 ", "five", "?", "15", "5", "Vintown")


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


def test_figures_by_kind_and_capability_by_task():
    assert scoring.figures(asked(), AFTER) == {
        "reliability": 0.5,
        "generalization": 1.0,
        "locality": 1.0,  # of the one probe whose answer is known
        "portability": 0.0,
        "reliability_eos_only": 0.0,  # the model runs on after the right answer
        "capability": 0.75,  # mean of sums (1 of 2) and places (1 of 1), not 2 of 3
    }


def test_figures_of_kinds_that_were_not_asked_are_null():
    nothing = Asked([], [], [], {})
    assert set(scoring.figures(nothing, answers()).values()) == {None}
    assert scoring.agreement(nothing, answers(), answers()) is None
    assert scoring.counts(nothing) == {}


def test_correct_is_unknown_without_a_known_answer():
    assert scoring.correct(asked(), AFTER)[3:6] == [True, None, None]


def test_agreement_counts_changed_answers_of_locality_probes_only():
    assert scoring.agreement(asked(), BEFORE, AFTER) == pytest.approx(2 / 3)
    assert scoring.agreement(asked(), AFTER, AFTER) == 1.0


def test_counts():
    assert scoring.counts(asked()) == {
        "reliability": 2,
        "generalization": 1,
        "locality": 3,
        "portability": 1,
        "capability": 3,
    }


def test_after_an_edit_edited_prompts_should_give_the_target_and_others_what_they_gave():
    assert ask.later_guesses(asked(), BEFORE) == [[10], [11], [12], *([100 + i] for i in range(3, 10))]


def test_lines_of_predictions():
    lines = scoring.predictions(asked(), BEFORE, AFTER)
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
    alone = scoring.predictions(asked(), None, AFTER)[0]
    assert (alone["before"], alone["after"], alone["correct"]) == (None, "Vintown", True)
    first = scoring.predictions(asked(), BEFORE, None)[0]
    assert (first["before"], first["after"], first["correct"]) == ("?", None, False)


# ---------------------------------------------------------------- with a model


def test_prepare_tokenizes_prompts_as_they_were_trained(model):
    items = [
        CapabilityItem("sums", "Ten plus five is", "15"),
        CapabilityItem("pick", "Is it?", "no", ("yes", "no")),
    ]
    made = probes.prepare(model, PROBES[:6], items)
    assert made.probes[6:] == [
        Probe("sums", "capability", "Ten plus five is", "15"),
        Probe("pick", "capability", "Is it?", "no"),
    ]
    assert made.choices == {7: ("yes", "no")}
    ids = lambda text: model.tokenizer(text)["input_ids"]  # noqa: E731
    for probe, prompt, guess in zip(made.probes, made.prompts, made.guesses, strict=True):
        assert prompt == ids(probe.prompt)
        assert guess == (ids(" " + probe.target) if probe.target else [])


def test_answers_end_by_the_official_rule_and_reliability_goes_on_while_it_can_match(model, monkeypatch):
    """Which tokens are asked for with which stop, and how they become texts."""
    ids = lambda text: model.tokenizer(text)["input_ids"]  # noqa: E731
    probes = [
        Probe("0", "reliability", "The capital of Oredal is", "St. Vintown"),
        Probe("1", "reliability", "Who founded the firm?", "Mira Halver"),
        Probe("2", "reliability", "Hana works as", "a baker"),
        Probe("2", "generalization", "Hana Orvik works as", "St. Vintown"),
        Probe("0", "locality", "Ten plus five is", None),
    ]
    said = [" St.", " Mira Oredal.", " a baker</s>", " St.", "\n"]
    calls = []

    def answer(reader, prompts, guesses, new_tokens, stop, on_done=lambda n: None, known=None, kept=None):
        dot = ids(".")[0]
        calls.append((prompts, guesses, new_tokens, bool(stop[0]), bool(stop[dot]), known))
        on_done(len(prompts))
        if known is None:
            return [ids(text) for text in said], 2
        return [ids(" St. Vintown") + [0]], 1

    monkeypatch.setattr(verify, "answer", answer)
    made = probes.prepare(model, probes, [])
    done = []
    got = ask.ask(model, {}, made, on_done=done.append)
    assert got.texts == ["St", "Mira Oredal", "a baker", "St", ""]
    assert got.full == ["St. Vintown", "Mira Oredal.", "a baker", "St.", ""]
    assert got.tokens == [ids(text) for text in said]
    assert got.proved == 2 and sum(done) == 5
    assert calls == [
        (made.prompts, made.guesses, NEW_TOKENS, True, True, None),
        # Only the first can still become its target; its guess goes on behind what is known.
        ([made.prompts[0]], [ids(" Vintown")], NEW_TOKENS, True, False, [ids(" St.")]),
    ]
    assert scoring.figures(made, got)["reliability"] == pytest.approx(1 / 3)
    assert scoring.figures(made, got)["reliability_eos_only"] == pytest.approx(2 / 3)


def test_the_share_that_differs_is_that_of_a_sample_decoded_again(tiny_model_dir, model):
    half = load_model(str(tiny_model_dir), "bfloat16", {"data": 1, "model": 1})
    made = probes.prepare(half, PROBES, [CapabilityItem("pick", "Is it?", "no", ("yes", "no"))])
    got = ask.ask(half, {}, made)
    share = lambda model, answers: ask.differing_share(model, {}, made, answers, 128, 0)  # noqa: E731
    rounding = share(half, got)
    assert 0 <= rounding < 0.5
    wrong = dataclasses.replace(got, tokens=[[*t[:-1], t[-1] + 1] if t else t for t in got.tokens])
    assert share(half, wrong) >= 1 - rounding  # of the probes without choices
    assert share(model, got) is None  # float32


def test_choices_are_scored_by_log_likelihood_a_character(model):
    items = [
        CapabilityItem(
            "t", "The capital of Oredal is", "Vintown", ("Vintown", "a baker", "Mira Halver", "15")
        ),
        CapabilityItem("t", "Who works as a baker?", "Hana Orvik", ("Hana Orvik", "Mira", "Ten plus five")),
        CapabilityItem("u", "Ten plus five", "is 15", ("is 15", "is 5", "is ten", "is a firm in Vintown")),
        CapabilityItem("u", "Was it founded?", "no", ("yes", "no")),
    ]
    done = []
    made = probes.prepare(model, [], items)
    got = ask.ask(model, {}, made, on_done=done.append)
    assert sum(done) == 4 and got.tokens == [[]] * 4 and got.proved == 0

    forward = jax.jit(decoder.logits)
    expected = []
    for item in items:
        head = model.tokenizer(item.prompt)["input_ids"]
        scores = []
        for choice in item.choices:
            ids = model.tokenizer(item.prompt + " " + choice)["input_ids"]
            padded = np.asarray([ids + [0] * (64 - len(ids))])
            logs = jax.nn.log_softmax(forward(model.params, padded)[0])
            total = sum(float(logs[at - 1, ids[at]]) for at in range(len(head), len(ids)))
            scores.append(total / len(choice))
        assert np.diff(np.sort(scores)).min() > 1e-4  # no ties
        expected.append(item.choices[int(np.argmax(scores))])
    assert got.texts == got.full == expected
    assert len({items[i].choices.index(t) for i, t in enumerate(expected)}) > 1
    right = [item.answer == text for item, text in zip(items, expected, strict=True)]
    tasks = [np.mean(right[:2]), np.mean(right[2:])]
    assert scoring.figures(made, got)["capability"] == pytest.approx(np.mean(tasks))


def test_probes_are_plain_values():
    assert dataclasses.asdict(PROBES[0]) == {
        "case": "0",
        "kind": "reliability",
        "prompt": "The capital of Oredal is",
        "target": "Vintown",
        "batch": 0,
    }

"""Asking a model every probe: which tokens are read with which stop, and how they become texts."""

import dataclasses

import jax
import numpy as np
import pytest

from locft_jax import load_model
from locft_jax.data.capability import CapabilityItem
from locft_jax.data.packing import corpus_from_lists
from locft_jax.evaluation import ask as ask_module
from locft_jax.evaluation.ask import ask, differing_share, later_drafts
from locft_jax.evaluation.probes import NEW_TOKENS, Answers, Probe, Questions, make_questions
from locft_jax.evaluation.scoring import figures, stop_tables
from locft_jax.evaluation.verify import Prompts, answer
from locft_jax.model import decoder

PROBES = [
    Probe("0", "reliability", "The capital of Oredal is", "Vintown"),
    Probe("1", "reliability", "Who founded the firm?", "Mira Halver"),
    Probe("0", "generalization", "Oredal's capital is", "Vintown"),
    Probe("0", "locality", "Hana works as", "a baker"),
    Probe("0", "locality", "Ten plus five is", None),
    Probe("1", "portability", "The founder was born in", "Vintown"),
    Probe("sums", "capability", "Ten minus five is", "5"),
]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


def test_after_an_edit_edited_prompts_should_give_the_target_and_others_what_they_gave():
    numbers = range(len(PROBES))
    nothing = corpus_from_lists([], [])
    questions = Questions(PROBES, [[1] for _ in numbers], [[10 + i] for i in numbers], {}, nothing)
    before = Answers(["?"] * len(PROBES), ["?"] * len(PROBES), [[100 + i] for i in numbers], 0)
    assert later_drafts(questions, before) == [[10], [11], [12], *([100 + i] for i in range(3, 7))]


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

    def answered(asked, prompts, row_length, on_done=lambda n: None, cache=None):
        stop, dot = prompts.stop, ids(".")[0]
        given = prompts.ids, prompts.drafts, prompts.new_tokens
        calls.append((*given, bool(stop[0]), bool(stop[dot]), prompts.begun))
        on_done(len(prompts.ids))
        if prompts.begun is None:
            return [ids(text) for text in said], 2
        return [ids(" St. Vintown") + [0]], 1

    monkeypatch.setattr(ask_module, "answer", answered)
    made = make_questions(model.tokenizer, probes, [], model.spec)
    done = []
    got = ask(model, made, on_done=done.append)
    assert got.texts == ["St", "Mira Oredal", "a baker", "St", ""]
    assert got.full == ["St. Vintown", "Mira Oredal.", "a baker", "St.", ""]
    assert got.tokens == [ids(text) for text in said]
    assert got.verified == 2 and sum(done) == 5
    assert calls == [
        (made.prompts, made.targets, NEW_TOKENS, True, True, None),
        # Only the first can still become its target; its draft goes on behind what is known.
        ([made.prompts[0]], [ids(" Vintown")], NEW_TOKENS, True, False, [ids(" St.")]),
    ]
    assert figures(made, got)["reliability"] == pytest.approx(1 / 3)
    assert figures(made, got)["reliability_eos_only"] == pytest.approx(2 / 3)


def test_the_share_that_differs_is_that_of_a_sample_decoded_again(tiny_model_dir, model, monkeypatch):
    half = load_model(str(tiny_model_dir), "bfloat16", {"data": 1, "model": 1})
    items = [CapabilityItem("pick", "Is it?", "no", ("yes", "no"))]
    made = make_questions(half.tokenizer, PROBES, items, half.spec)
    got = ask(half, made)
    official, _ = stop_tables(half.tokenizer, 320, half.eos)
    decoded, _ = answer(half, Prompts(made.prompts[:7], [[]] * 7, NEW_TOKENS, official))
    differs = [a != b for a, b in zip(decoded, got.tokens, strict=False)]  # of the seven without choices
    assert differing_share(half, made, got, 128, 0) == np.mean(differs) < 0.5
    # Other answers than those of decoding all, for some of them.
    wrong = [0, 3, 6]
    tokens = [[*t[:-1], t[-1] + 1] if i in wrong else t for i, t in enumerate([*decoded, []])]
    altered = dataclasses.replace(got, tokens=tokens)
    assert differing_share(half, made, altered, 128, 0) == pytest.approx(3 / 7)
    monkeypatch.setattr(ask_module, "SAMPLE", 4)
    sample = np.random.default_rng(5).permutation(7)[:4]
    assert differing_share(half, made, altered, 128, 5) == np.mean(np.isin(sample, wrong))
    assert differing_share(model, made, got, 128, 0) is None  # float32


def test_choices_are_scored_by_log_likelihood_a_character(model):
    items = [
        CapabilityItem("t", "The capital of Oredal is", "Vintown", ("Vintown", "a baker", "Mira", "15")),
        CapabilityItem("t", "Who works as a baker?", "Hana Orvik", ("Hana Orvik", "Mira", "Ten plus five")),
        CapabilityItem("u", "Ten plus five", "is 15", ("is 15", "is 5", "is ten", "is a firm in Vintown")),
        CapabilityItem("u", "Was it founded?", "no", ("yes", "no")),
    ]
    done = []
    made = make_questions(model.tokenizer, [], items, model.spec)
    got = ask(model, made, on_done=done.append)
    assert sum(done) == 4 and got.tokens == [[]] * 4 and got.verified == 0

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
    assert figures(made, got)["capability"] == pytest.approx(np.mean(tasks))

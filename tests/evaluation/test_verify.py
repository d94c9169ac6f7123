"""Fast exact answers against decoding every token by itself with the plain forward, float32."""

import dataclasses

import jax
import numpy as np
import pytest

from locft_jax import load_model
from locft_jax.data.packing import corpus_from_lists
from locft_jax.evaluation import verify
from locft_jax.evaluation.verify import ProbeCache, Prompts, answer, begin_cache, score_corpus
from locft_jax.model import decode as decode_module
from locft_jax.model import decoder
from locft_jax.model.weights import take_tensor

NEW = 32
LENGTH = 48
forward = jax.jit(decoder.logits)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """The tiny model with an override, so that overrides matter in every comparison."""
    model = load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})
    value = np.random.default_rng(3).standard_normal((320, 32), np.float32)
    return model.with_overrides({"lm_head.weight": 0.2 * value})


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(4)
    return [rng.integers(1, 320, n).tolist() for n in rng.integers(1, 9, 16)]


@pytest.fixture(scope="module")
def stop():
    table = np.zeros(320, bool)
    table[np.random.default_rng(7).choice(320, 12, replace=False)] = True
    return table


@pytest.fixture(scope="module")
def truth(model, prompts, stop):
    """Greedy answers by the plain forward, one token of every text at a time."""
    texts = [list(p) for p in prompts]
    for _ in range(NEW):
        tokens = np.asarray([t + [0] * (LENGTH - len(t)) for t in texts])  # causal: padding is not seen
        scores = np.asarray(forward(model.params, tokens))
        for text, row in zip(texts, scores, strict=True):
            text.append(int(row[len(text) - 1].argmax()))
    answers = [t[len(p) :] for t, p in zip(texts, prompts, strict=True)]
    ends = [next((n + 1 for n, t in enumerate(a) if stop[t]), NEW) for a in answers]
    return [a[:n] for a, n in zip(answers, ends, strict=True)]


def drafts_from(truth, stop):
    """For every true answer one of ten kinds of draft, right and wrong."""
    stopper = int(np.flatnonzero(stop)[0])
    other = int(np.flatnonzero(~stop)[0])
    make = [
        lambda a: a,  # right, with its stop token (or all 32 tokens)
        lambda a: a[:-1],  # right, without the last one
        lambda a: a[: len(a) // 2],  # truncated
        lambda a: [*a[: len(a) // 2], (a[len(a) // 2] + 1) % 320, *a[len(a) // 2 + 1 :]],  # altered
        lambda a: [(a[0] + 1) % 320, *a[1:]],  # wrong from the start
        lambda a: [*a, other, other],  # goes on after the right end
        lambda a: [*a[: len(a) // 2], stopper, *a[len(a) // 2 :]],  # a stop where the model has none
        lambda a: [],  # nothing to go by
        lambda a: [stopper],  # nothing but a stop
        lambda a: [other] * 40,  # longer than any answer
    ]
    return [make[i % len(make)](a) for i, a in enumerate(truth)]


def verified_by(draft, true, stop):
    """Whether one pass over the draft shows all of the true answer: it shows what the model says up to
    and including the first token that differs, or the one after the draft."""
    cut = next((n for n, t in enumerate(draft) if stop[t]), len(draft))
    common = next((n for n in range(min(cut, len(true))) if draft[n] != true[n]), min(cut, len(true)))
    return common + 1 >= len(true)


def ask(model, ids, drafts, stop, new_tokens=NEW, row_length=128, begun=None, cache=None):
    done = []
    prompts = Prompts(ids, drafts, new_tokens, stop, begun)
    got = answer(model, prompts, row_length, done.append, cache)
    assert sum(done) == len(ids)  # the bar ends full
    return got


def count_texts(monkeypatch, name="packed"):
    """A list that grows by the number of texts of every pass, or with `read_batch` of each of its batches
    that begins with tokens."""
    counts, function = [], getattr(verify, name)

    def counted(*arguments):
        counts.append(len(arguments[1]) if name == "packed" else 1)
        return function(*arguments)

    monkeypatch.setattr(verify, name, counted)
    return counts


def test_the_answers_are_a_fair_test(truth, stop):
    lengths = [len(a) for a in truth]
    assert sum(n == NEW for n in lengths) > 3  # open-ended ones, and
    assert sum(n < 8 for n in lengths) > 3  # short ones
    assert all(not stop[t] for a in truth for t in a[:-1])


def test_drafts_never_change_an_answer(model, prompts, truth, stop):
    drafts = drafts_from(truth, stop)
    answers, verified = ask(model, prompts, drafts, stop)
    assert answers == truth
    expected = [verified_by(d, a, stop) for d, a in zip(drafts, truth, strict=True)]
    assert verified == sum(expected) and 4 <= verified <= 12  # hits and misses

    nothing = [[] for _ in prompts]
    answers, verified = ask(model, prompts, nothing, stop)
    assert answers == truth
    assert verified == sum(len(a) == 1 for a in truth)


def test_short_rows_and_open_ends_at_the_limit(model, prompts, truth, stop):
    """Rows shorter than a text grow to hold it, and 31 right tokens show the 32nd."""
    drafts = [a[:31] for a in truth]
    assert ask(model, prompts, drafts, stop, row_length=8) == (truth, len(prompts))


def test_equal_prompts_are_asked_once(model, prompts, truth, stop, monkeypatch):
    read = count_texts(monkeypatch)
    again = [0, 1, 0, 2, 1, 1]
    drafts = [truth[0], truth[1], [], truth[2], [], []]
    answers, verified = ask(model, [prompts[i] for i in again], drafts, stop, new_tokens=8)
    assert answers == [truth[i][:8] for i in again]
    assert sum(read) == 3 and verified == 6


def test_what_is_known_of_an_answer_is_not_asked(model, prompts, truth, stop):
    begun = [a[: len(a) * (i % 4) // 3] for i, a in enumerate(truth)]
    drafts = [a[len(b) :] if i % 2 else [] for i, (a, b) in enumerate(zip(truth, begun, strict=True))]
    answers, verified = ask(model, prompts, drafts, stop, begun=begun)
    assert answers == truth and 4 <= verified < 16
    assert ask(model, prompts, [[]] * 16, stop, begun=truth) == (truth, 0)


def test_decode_slots_are_taken_again_and_become_fewer(model, prompts, truth, stop, monkeypatch):
    """Few slots, several passes, texts of several lengths: slots are taken again, the ring goes round."""
    monkeypatch.setattr(verify, "ROWS", 2)
    monkeypatch.setattr(verify, "MOST", 6)
    monkeypatch.setattr(decode_module, "LEAST", 2)
    sizes, decode = [], decode_module.decode

    def counted(params, state, stop, enough):
        sizes.append(state.left.shape[0])
        return decode(params, state, stop, enough)

    monkeypatch.setattr(decode_module, "decode", counted)
    long = [[*p, *a[:24]] for p, a in zip(prompts, truth, strict=True) if len(a) > 24]
    answers, _ = ask(model, [*prompts, *long], [[]] * (16 + len(long)), stop, row_length=32)
    assert answers[:16] == truth
    assert [a[: NEW - 24] for a in answers[16:]] == [a[24:] for a in truth if len(a) > 24]
    assert max(sizes) == 6 and min(sizes) == 2 and sizes.count(6) > 4


@pytest.mark.parametrize("mode", ["device", "host", "disk"])
def test_passes_before_and_after_an_edit_share_what_is_below_it(
    model, prompts, truth, stop, mode, monkeypatch
):
    cache = ProbeCache(1, mode)
    name = "model.layers.1.mlp.down_proj.weight"
    own = take_tensor(model.params, name)
    before = model.with_overrides({name: own})
    drafts = drafts_from(truth, stop)
    answers, verified = ask(before, prompts, drafts, stop, cache=cache)
    assert answers == truth and cache.source.layer == 1 and cache.source.mode == mode
    # What was kept is what enters the layer: the rest of the model gives the same answers without tokens.
    read = count_texts(monkeypatch, "read_batch")
    assert ask(before, prompts, drafts, stop, cache=cache)[1] == verified
    assert len(read) > 0  # for the misses

    changed = own + 0.3 * np.random.default_rng(8).standard_normal(own.shape, np.float32)
    after = model.with_overrides({name: changed})
    expected, _ = ask(after, prompts, [[]] * 16, stop)
    assert expected != truth
    assert ask(after, prompts, drafts, stop, cache=cache)[0] == expected
    read.clear()
    # Texts that were not read before are read from their tokens.
    assert ask(after, prompts, expected, stop, cache=cache) == (expected, 16)
    assert len(read) == 1


@pytest.mark.parametrize("mode", ["device", "host"])
def test_a_cache_of_drafts_is_carried_upward(model, prompts, stop, mode, monkeypatch):
    model = dataclasses.replace(model, params=model.params.over({}))  # the cache is of its own weights
    drafts, _ = ask(model, prompts, [[]] * 16, stop)
    cache = begin_cache(Prompts(prompts, drafts, NEW, stop), model.mesh, mode)
    read = count_texts(monkeypatch, "read_batch")
    for layer in range(3):
        assert cache.source.layer == layer
        assert ask(model, prompts, drafts, stop, cache=cache) == (drafts, 16)
        if layer < 2:
            cache.advance(model, 128)
    assert not read  # right drafts are all verified from the cache
    name = "model.layers.2.mlp.down_proj.weight"
    value = 0.3 * np.random.default_rng(8).standard_normal((32, 64), np.float32)
    after = model.with_overrides({name: value})
    expected, _ = ask(after, prompts, [[]] * 16, stop)
    read.clear()
    assert expected != drafts and ask(after, prompts, drafts, stop, cache=cache)[0] == expected
    assert len(read) > 0  # for the misses


def test_no_prompts(model, stop):
    assert ask(model, [], [], stop) == ([], 0)


def test_the_same_on_eight_devices(tiny_model_dir, model, prompts, truth, stop):
    spread = load_model(str(tiny_model_dir), mesh={"data": 4, "model": 2})
    spread = spread.with_overrides({n: np.asarray(a) for n, a in model.overrides.items()})
    drafts = [a if i % 3 else [] for i, a in enumerate(truth)]
    answers, verified = ask(spread, prompts, drafts, stop, new_tokens=8)
    assert answers == [a[:8] for a in truth] and 10 <= verified < 16


def test_scores_are_those_of_the_plain_forward(model):
    """Arg-max and log-probability of every target token, in corpus order, whatever the packing."""
    rng = np.random.default_rng(6)
    lengths = rng.integers(2, 40, 16)
    texts = [rng.integers(1, 320, n).tolist() for n in lengths]
    starts = [int(rng.integers(1, n)) for n in lengths]
    corpus = corpus_from_lists(texts, starts)
    scored = sorted(score_corpus(model, corpus, 48))
    assert [n for n, *_ in scored] == list(range(len(texts)))
    best, logprob = (np.concatenate(part) for part in list(zip(*scored, strict=True))[1:])
    tokens = np.asarray([t + [0] * (LENGTH - len(t)) for t in texts])
    scores = np.asarray(forward(model.params, tokens), np.float64)
    logs = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logs -= scores.max(-1, keepdims=True)
    places = [(i, at) for i, (n, s) in enumerate(zip(lengths, starts, strict=True)) for at in range(s, n)]
    assert len(places) == len(best) == len(logprob)
    np.testing.assert_array_equal(best, [scores[i, at - 1].argmax() for i, at in places])
    expected = [logs[i, at - 1, texts[i][at]] for i, at in places]
    np.testing.assert_allclose(logprob, expected, atol=1e-4, rtol=0)


def test_scores_of_nothing(model):
    assert not list(score_corpus(model, corpus_from_lists([], []), 128))

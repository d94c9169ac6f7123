"""Ask a model every probe: greedy answers by the stop rule, and choices by log-likelihood."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from locft_jax.errors import UserError
from locft_jax.evaluation.probes import NEW_TOKENS, Answers, Questions
from locft_jax.evaluation.scoring import cut, may_match, stop_tables
from locft_jax.evaluation.verify import ProbeCache, Prompts, answer, begin_cache, score_corpus
from locft_jax.model.activation_cache import mode_for
from locft_jax.model.model import Model

SAMPLE = 200  # probes that are decoded again to see what rounding does


def ask(
    model: Model,
    questions: Questions,
    drafts: Sequence[Sequence[int]] | None = None,
    row_length: int = 128,
    on_done: Callable[[int], None] = lambda count: None,
    cache: ProbeCache | None = None,
) -> Answers:
    """Greedy answers of the model, with its overrides, to every probe. `drafts` (default: the targets) and
    `cache` only decide how fast that is, never what is answered."""
    drafts = questions.targets if drafts is None else drafts
    official, eos_only = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    free = questions.free()
    tokens: list[list[int]] = [[] for _ in questions.probes]
    prompts = _prompts(questions, free, [drafts[i] for i in free], official)
    found, verified = answer(model, prompts, row_length, on_done, cache)
    for i, ids in zip(free, found, strict=True):
        tokens[i] = ids
    said = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    texts = [cut(t) for t in said]  # a newline at the very beginning ends an answer too
    # Reliability is also reported with EOS as the only stop: where that can still be a match, go on.
    more = [
        i
        for i in free
        if questions.probes[i].kind == "reliability"
        and not eos_only[tokens[i][-1]]
        and may_match(said[i], str(questions.probes[i].target))
    ]
    rest = _prompts(questions, more, [_rest(drafts[i], tokens[i]) for i in more], eos_only)
    rest = dataclasses.replace(rest, begun=[tokens[i] for i in more])
    found, _ = answer(model, rest, row_length, cache=cache)
    for i, text in zip(more, model.tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
        said[i] = text
    full = [t.strip() for t in said]
    for i, choice in _choose(model, questions, row_length).items():
        texts[i] = full[i] = choice
    on_done(len(questions.choices))
    return Answers(texts, full, tokens, verified)


def _prompts(questions: Questions, which: Sequence[int], drafts: Any, stop: np.ndarray) -> Prompts:
    return Prompts([questions.prompts[i] for i in which], drafts, NEW_TOKENS, stop)


def probe_cache(
    model: Model, questions: Questions, layer: int, mode: str, beside: int, budgets: tuple[float, float]
) -> ProbeCache | None:
    """Room for what the passes before and after an edit at `layer` share, where the budget has it beside
    the edit's own cache over `beside` tokens; None where it has not, or where nothing is below."""
    texts = sum(len(p) + len(t) + 1 for p, t in zip(questions.prompts, questions.targets, strict=True))
    try:
        mode = mode_for(model.params, model.mesh, mode, layer, texts + beside, budgets)
    except UserError:  # the mode that was asked for holds the edit's own at most
        return None
    return ProbeCache(layer, mode) if mode != "off" else None


def rising_cache(
    model: Model, questions: Questions, drafts: Sequence[Sequence[int]], like: ProbeCache | None
) -> ProbeCache | None:
    """What `ask` with these drafts reads first, at layer 0, to be carried upward with `advance` for edits
    at one layer after another. `like`: as `probe_cache` gave it; None where it is None."""
    if like is None:
        return None
    free = questions.free()
    official, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    prompts = _prompts(questions, free, [drafts[i] for i in free], official)
    return begin_cache(prompts, model.mesh, like.mode)


def differing_share(
    model: Model, questions: Questions, answers: Answers, row_length: int, seed: int
) -> float | None:
    """In bfloat16 one pass and decoding token by token may round differently: the share (0-1) of a
    seeded sample of at most SAMPLE probes whose answer is not that of decoding all. None in float32,
    where there is no such probe."""
    free = questions.free()
    if np.dtype(model.dtype) == np.float32 or not free:
        return None
    some = [free[i] for i in np.random.default_rng(seed).permutation(len(free))[:SAMPLE]]
    official, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    plain, _ = answer(model, _prompts(questions, some, [[]] * len(some), official), row_length)
    return float(np.mean([p != answers.tokens[i] for p, i in zip(plain, some, strict=True)]))


def _rest(draft: Sequence[int], begun: Sequence[int]) -> Sequence[int]:
    """What follows `begun` in a draft that begins so, else nothing."""
    return draft[len(begun) :] if list(draft[: len(begun)]) == list(begun) else []


def _choose(model: Model, questions: Questions, row_length: int) -> dict[int, str]:
    """For every probe with choices, the one with the highest log-likelihood per character (lm-eval's
    `acc_norm`)."""
    which = [(i, c) for i, choices in questions.choices.items() for c in choices]
    scored = score_corpus(model, questions.choice_pairs, row_length)
    scores = {n: float(logprob.sum()) for n, _, logprob in scored}
    best: dict[int, tuple[float, str]] = {}
    for n, (i, choice) in enumerate(which):
        score = scores[n] / max(1, len(choice))
        if i not in best or score > best[i][0]:
            best[i] = (score, choice)
    return {i: choice for i, (_, choice) in best.items()}


def later_drafts(questions: Questions, before: Answers) -> list[list[int]]:
    """Drafts for the pass after an edit: edited prompts should give the target, others what they gave
    before."""
    edited = ("reliability", "generalization")
    return [
        target if p.kind in edited else tokens
        for p, target, tokens in zip(questions.probes, questions.targets, before.tokens, strict=True)
    ]

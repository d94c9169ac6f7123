"""evaluation.ask."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from locft_jax.config import Config
from locft_jax.data.tokenize import encode_pairs
from locft_jax.editing.run import agreed_budgets
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import NEW_TOKENS, Answers, Asked
from locft_jax.evaluation.scoring import cut, may_match, stop_tables
from locft_jax.evaluation.verify import ProbeCache, answer, begin_cache, score_corpus
from locft_jax.model.activation_cache import choose_mode
from locft_jax.model.decode import Reader
from locft_jax.model.model import Model
from locft_jax.model.sharding import width_split
from locft_jax.model.weights import Overrides

SAMPLE = 200  # probes that are decoded again to see what rounding does


def ask(
    model: Model,
    edits: Overrides,
    asked: Asked,
    guesses: Sequence[Sequence[int]] | None = None,
    row_length: int = 128,
    on_done: Callable[[int], None] = lambda count: None,
    kept: ProbeCache | None = None,
) -> Answers:
    """Greedy answers of the model with `edits` to every probe. `guesses` (default: the targets) and
    `kept` only decide how fast that is, never what is answered."""
    guesses = asked.guesses if guesses is None else guesses
    official, eos_only = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    reader = Reader(model.spec, model.weights, edits, model.mesh, row_length)
    free = [i for i in range(len(asked.probes)) if i not in asked.choices]
    tokens: list[list[int]] = [[] for _ in asked.probes]
    prompts, drafts = [asked.prompts[i] for i in free], [guesses[i] for i in free]
    found, proved = answer(reader, prompts, drafts, NEW_TOKENS, official, on_done, kept=kept)
    for i, ids in zip(free, found, strict=True):
        tokens[i] = ids
    said = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    texts = [cut(t) for t in said]  # a newline at the very beginning ends an answer too
    # Reliability is also reported with EOS as the only stop: where that can still be a match, go on.
    more = [
        i
        for i in free
        if asked.probes[i].kind == "reliability"
        and not eos_only[tokens[i][-1]]
        and may_match(said[i], str(asked.probes[i].target))
    ]
    prompts, begun = [asked.prompts[i] for i in more], [tokens[i] for i in more]
    drafts = [_rest(guesses[i], tokens[i]) for i in more]
    found, _ = answer(reader, prompts, drafts, NEW_TOKENS, eos_only, known=begun, kept=kept)
    for i, text in zip(more, model.tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
        said[i] = text
    full = [t.strip() for t in said]
    for i, choice in _choose(reader, model.tokenizer, asked).items():
        texts[i] = full[i] = choice
    on_done(len(asked.choices))
    return Answers(texts, full, tokens, proved)


def probe_cache(model: Model, asked: Asked, layer: int, config: Config, beside: int) -> ProbeCache | None:
    """Room for what the passes before and after an edit at `layer` share, where the budget has it beside
    the edit's own cache over `beside` tokens; None where it has not, or where nothing is below."""
    mode = _cache_mode(model, asked, layer, config, beside)
    return ProbeCache(layer, mode) if mode != "off" else None


def _cache_mode(model: Model, asked: Asked, layer: int, config: Config, beside: int) -> str:
    texts = sum(len(p) + len(g) + 1 for p, g in zip(asked.prompts, asked.guesses, strict=True))
    size = (texts + beside) * model.spec.d_model * np.dtype(model.dtype).itemsize
    try:
        split = width_split(model.mesh, model.spec.d_model)
        return choose_mode(config.prefix_cache, layer, size, *agreed_budgets(config), split)
    except UserError:  # the mode that was asked for holds the edit's own at most
        return "off"


def rising_cache(
    model: Model, asked: Asked, guesses: Sequence[Sequence[int]], config: Config, beside: int
) -> ProbeCache | None:
    """What `ask` with these guesses reads first, at layer 0, to be carried upward with `advance` for edits
    at one layer after another; None where the budget has no room for it."""
    mode = _cache_mode(model, asked, 1, config, beside)
    if mode == "off":
        return None
    free = [i for i in range(len(asked.probes)) if i not in asked.choices]
    official, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    prompts, drafts = [asked.prompts[i] for i in free], [guesses[i] for i in free]
    return begin_cache(prompts, drafts, NEW_TOKENS, official, model.mesh, mode)


def differing_share(
    model: Model, edits: Overrides, asked: Asked, answers: Answers, row_length: int, seed: int
) -> float | None:
    """In bfloat16 one pass and decoding token by token may round differently: the share (0-1) of a
    seeded sample of at most SAMPLE probes whose answer is not that of decoding all. None in float32,
    where there is no such probe."""
    free = [i for i in range(len(asked.probes)) if i not in asked.choices]
    if np.dtype(model.dtype) == np.float32 or not free:
        return None
    some = [free[i] for i in np.random.default_rng(seed).permutation(len(free))[:SAMPLE]]
    official, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    reader = Reader(model.spec, model.weights, edits, model.mesh, row_length)
    plain, _ = answer(reader, [asked.prompts[i] for i in some], [[]] * len(some), NEW_TOKENS, official)
    return float(np.mean([p != answers.tokens[i] for p, i in zip(plain, some, strict=True)]))


def _rest(guess: Sequence[int], begun: Sequence[int]) -> Sequence[int]:
    """What follows `begun` in a guess that begins so, else nothing."""
    return guess[len(begun) :] if list(guess[: len(begun)]) == list(begun) else []


def _choose(reader: Reader, tokenizer: Any, asked: Asked) -> dict[int, str]:
    """For every probe with choices, the one with the highest log-likelihood a character (lm-eval's
    `acc_norm`)."""
    which = [(i, c) for i, choices in asked.choices.items() for c in choices]
    corpus = encode_pairs(tokenizer, [asked.probes[i].prompt for i, _ in which], [c for _, c in which])
    scores = {n: float(logprob.sum()) for n, _, logprob in score_corpus(reader, corpus)}
    best: dict[int, tuple[float, str]] = {}
    for n, (i, choice) in enumerate(which):
        score = scores[n] / max(1, len(choice))
        if i not in best or score > best[i][0]:
            best[i] = (score, choice)
    return {i: choice for i, (_, choice) in best.items()}


def later_guesses(asked: Asked, before: Answers) -> list[list[int]]:
    """Guesses for the pass after an edit: edited prompts should give the target, others what they
    gave before."""
    edited = ("reliability", "generalization")
    return [
        g if p.kind in edited else t
        for p, g, t in zip(asked.probes, asked.guesses, before.tokens, strict=True)
    ]

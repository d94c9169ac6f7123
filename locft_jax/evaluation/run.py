"""Ask a model every probe, score the answers, and say how they changed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from locft_jax import hosts
from locft_jax.config import Config
from locft_jax.data.capability import CapabilityItem
from locft_jax.data.tokens import check_prompts, encode_pairs, prompt_ids
from locft_jax.editing.prefix import choose_mode
from locft_jax.editing.run import memory_budgets
from locft_jax.errors import UserError
from locft_jax.evaluation.answers import ProbeCache, answer, begin_cache, score_corpus
from locft_jax.evaluation.generate import Reader
from locft_jax.evaluation.metrics import (
    KINDS,
    NEW_TOKENS,
    Probe,
    cut,
    matches,
    may_match,
    rate,
    stop_tables,
)
from locft_jax.model.hf import Model
from locft_jax.model.sharding import width_split
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Edits

CAPABILITY = "capability"
SAMPLE = 200  # probes that are decoded again to see what rounding does


@dataclasses.dataclass(frozen=True)
class Asked:
    """Probes made ready: token ids of each prompt, and of what it is expected to be answered."""

    probes: list[Probe]
    prompts: list[list[int]]
    guesses: list[list[int]]  # the target's ids; empty where there is no target
    choices: dict[int, tuple[str, ...]]  # probe -> choices that are scored by log-likelihood


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the model said, probe by probe."""

    texts: list[str]  # by the official stop rule (for choices: the choice taken)
    full: list[str]  # of reliability probes: until EOS, or until they cannot match any more
    tokens: list[list[int]]  # by the official stop rule, stop token included; empty for choices
    proved: int  # how many answers one forward pass proved


def prepare(
    model: Model, probes: Sequence[Probe], capability: Sequence[CapabilityItem], chat_template: bool = False
) -> Asked:
    """Tokenize all probes and capability items once. Raises UserError as `encode_pairs` does."""
    items = [Probe(item.task, CAPABILITY, item.prompt, item.answer) for item in capability]
    every = [*probes, *items]
    choices = {len(probes) + i: item.choices for i, item in enumerate(capability) if item.choices}
    known = [i for i, p in enumerate(every) if p.target]
    pairs = encode_pairs(
        model.tokenizer,
        [every[i].prompt for i in known],
        [str(every[i].target) for i in known],
        chat_template=chat_template,
    )
    prompts = prompt_ids(model.tokenizer, [p.prompt for p in every], chat_template)
    guesses: list[list[int]] = [[] for _ in every]
    for row, i in enumerate(known):
        ids = pairs.tokens[pairs.offsets[row] : pairs.offsets[row + 1]].tolist()
        prompts[i], guesses[i] = ids[: pairs.target_start[row]], ids[pairs.target_start[row] :]
    return Asked(every, prompts, guesses, choices)


def check_probes(
    tokenizer: Any,
    spec: ModelSpec,
    probes: Sequence[Probe],
    capability: Sequence[CapabilityItem],
    chat_template: bool = False,
) -> None:
    """Raise UserError, before any weight is loaded, for what could not be asked: texts without tokens,
    longer than the model's context, or beyond its vocabulary."""
    known = [(p.prompt, p.target) for p in probes if p.target]
    known += [(item.prompt, item.answer) for item in capability]
    choices = [(item.prompt, c) for item in capability for c in item.choices]
    for pairs, template in ((known, chat_template), (choices, False)):
        prompts, targets = [p for p, _ in pairs], [t for _, t in pairs]
        encode_pairs(
            tokenizer,
            prompts,
            targets,
            chat_template=template,
            max_length=spec.max_position,
            vocab_size=spec.vocab_size,
        )
    unknown = [p.prompt for p in probes if not p.target]
    check_prompts(tokenizer, unknown, chat_template, spec.max_position, spec.vocab_size)


def ask(
    model: Model,
    edits: Edits,
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
        device, host = hosts.least(*memory_budgets(config.memory_budget))
        split = width_split(model.mesh, model.spec.d_model)
        return choose_mode(config.prefix_cache, layer, size, device, host, split)
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
    model: Model, edits: Edits, asked: Asked, answers: Answers, row_length: int, seed: int
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


def correct(asked: Asked, answers: Answers) -> list[bool | None]:
    """Normalized exact match of each probe; None where no answer is known."""
    return [
        None if p.target is None else matches(t, p.target)
        for p, t in zip(asked.probes, answers.texts, strict=True)
    ]


def figures(asked: Asked, answers: Answers) -> dict[str, float | None]:
    """Rates 0-1 of every kind of probe; capability is the mean over tasks, as the paper's is."""
    right = correct(asked, answers)
    by_kind: dict[str, list[bool]] = {k: [] for k in KINDS}
    by_task: dict[str, list[bool]] = {}
    to_eos: list[bool] = []
    for i, (probe, ok) in enumerate(zip(asked.probes, right, strict=True)):
        if ok is None:
            continue
        if probe.kind == CAPABILITY:
            by_task.setdefault(probe.case, []).append(ok)
        else:
            by_kind[probe.kind].append(ok)
        if probe.kind == "reliability":
            to_eos.append(matches(answers.full[i], str(probe.target)))
    rates = {kind: rate(values) for kind, values in by_kind.items()}
    tasks = [float(np.mean(v)) for v in by_task.values()]
    return {
        **rates,
        "reliability_eos_only": rate(to_eos),
        CAPABILITY: float(np.mean(tasks)) if tasks else None,
    }


def by_batch(asked: Asked, answers: Answers, batches: int) -> list[dict[str, float | None]]:
    """Reliability and generalization (0-1) of the requests of each of `batches` arrivals."""
    right = correct(asked, answers)
    kinds = ("reliability", "generalization")
    found: list[dict[str, list[bool]]] = [{k: [] for k in kinds} for _ in range(batches)]
    for probe, ok in zip(asked.probes, right, strict=True):
        if probe.kind in kinds and ok is not None:
            found[probe.batch][probe.kind].append(ok)
    return [{k: rate(values) for k, values in batch.items()} for batch in found]


def agreement(asked: Asked, before: Answers, after: Answers) -> float | None:
    """Share of locality probes whose answer did not change."""
    same = [
        matches(b, a)
        for p, b, a in zip(asked.probes, before.texts, after.texts, strict=True)
        if p.kind == "locality"
    ]
    return rate(same)


def later_guesses(asked: Asked, before: Answers) -> list[list[int]]:
    """Guesses for the pass after an edit: edited prompts should give the target, others what they
    gave before."""
    edited = ("reliability", "generalization")
    return [
        g if p.kind in edited else t
        for p, g, t in zip(asked.probes, asked.guesses, before.tokens, strict=True)
    ]


def counts(asked: Asked) -> dict[str, int]:
    """How many probes of each kind were asked."""
    kinds = [p.kind for p in asked.probes]
    return {k: kinds.count(k) for k in (*KINDS, CAPABILITY) if k in kinds}


def predictions(asked: Asked, before: Answers | None, after: Answers | None) -> list[dict[str, Any]]:
    """Lines of predictions.jsonl; `correct` judges the later answer there is."""
    last = after or before
    assert last is not None
    right = correct(asked, last)
    return [
        {
            "case": p.case,
            "probe": p.kind,
            "prompt": p.prompt,
            "target": p.target,
            "before": before.texts[i] if before else None,
            "after": after.texts[i] if after else None,
            "correct": right[i],
        }
        for i, p in enumerate(asked.probes)
    ]

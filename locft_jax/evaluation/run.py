"""Ask a model every probe, score the answers, and say how they changed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from locft_jax.data.capability import CapabilityItem
from locft_jax.data.tokens import check_prompts, encode_pairs, prompt_ids
from locft_jax.evaluation.answers import answer, score_corpus
from locft_jax.evaluation.metrics import KINDS, NEW_TOKENS, Probe, cut, matches, rate, stop_tables
from locft_jax.model.hf import Model
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Edits

CAPABILITY = "capability"


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
    full: list[str]  # until EOS; differs for reliability probes only
    tokens: list[list[int]]  # as decoded, stop token included; empty for choices
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
) -> Answers:
    """Greedy answers of the model with `edits` to every probe. `guesses` (default: the targets) only
    decide how fast that is, never what is answered."""
    guesses = asked.guesses if guesses is None else guesses
    official, eos_only = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    count = len(asked.probes)
    tokens: list[list[int]] = [[] for _ in range(count)]
    # Reliability is also reported with EOS as the only stop, so those are decoded until EOS.
    to_eos = [i for i in range(count) if asked.probes[i].kind == "reliability"]
    rest = [i for i in range(count) if asked.probes[i].kind != "reliability" and i not in asked.choices]
    proved = 0
    for which, stop in ((to_eos, eos_only), (rest, official)):
        if not which:
            continue
        found, hits = answer(
            model.spec,
            model.weights,
            edits,
            [asked.prompts[i] for i in which],
            [guesses[i] for i in which],
            NEW_TOKENS,
            stop,
            model.mesh,
            row_length,
            on_done,
        )
        proved += hits
        for i, ids in zip(which, found, strict=True):
            tokens[i] = ids
    said = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    full = [t.strip() for t in said]
    texts = [cut(t) for t in said]  # a newline at the very beginning ends an answer too
    for i, choice in _choose(model, edits, asked, row_length).items():
        texts[i] = full[i] = choice
    on_done(len(asked.choices))
    return Answers(texts, full, tokens, proved)


def _choose(model: Model, edits: Edits, asked: Asked, row_length: int) -> dict[int, str]:
    """For every probe with choices, the one with the highest log-likelihood a character (lm-eval's
    `acc_norm`)."""
    which = [(i, c) for i, choices in asked.choices.items() for c in choices]
    corpus = encode_pairs(model.tokenizer, [asked.probes[i].prompt for i, _ in which], [c for _, c in which])
    _, logprob = score_corpus(model.spec, model.weights, edits, corpus, model.mesh, row_length)
    begin = np.concatenate([[0], np.cumsum(corpus.target_lengths)])
    best: dict[int, tuple[float, str]] = {}
    for row, (i, choice) in enumerate(which):
        score = float(logprob[begin[row] : begin[row + 1]].sum()) / max(1, len(choice))
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

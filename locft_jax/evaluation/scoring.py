"""The stop rule and the scorer: what counts as a right answer ("WILD" protocol). Autoregressive, greedy, at
most 32 new tokens; the answer ends at `.`, a newline or EOS; then normalized exact match.
"""

import functools
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.evaluation.probes import CAPABILITY, KINDS, Answers, Questions

STOP_CHARACTERS = (".", "\n")


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, white space folded (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def cut(text: str) -> str:
    """The answer up to the first `.` or newline."""
    return re.split(r"[.\n]", text, maxsplit=1)[0].strip()


def matches(answer: str, target: str) -> bool:
    """Normalized exact match."""
    return normalize(answer) == normalize(target)


def unreachable(target: str) -> bool:
    """Whether the official stop rule ends every answer before this target is complete."""
    return not matches(cut(target.strip()), target)


def may_match(begun: str, target: str) -> bool:
    """Whether an answer that begins so can still come to match `target`, whatever follows."""
    part = re.split(r"\s", begun)[-1]  # a word that may go on; those before it are what they are
    words, goal = normalize(begun[: len(begun) - len(part)]).split(), normalize(target).split()
    bare = "".join(c for c in part.lower() if c not in string.punctuation)
    if words != goal[: len(words)]:
        return False
    if not part.isascii():  # what lower case and word boundaries will make of it is not known yet
        return True
    return any(word.startswith(bare) for word in (*goal[len(words) : len(words) + 1], "a", "an", "the"))


@functools.lru_cache(maxsize=4)
def stop_tables(tokenizer: Any, vocab_size: int, eos: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(official, eos_only): which token ids end an answer, [V] bool each. A token whose text holds a stop
    character ends it officially; the text is cut at that character. Kept for the next call."""
    eos_only = np.zeros(vocab_size, bool)
    eos_only[[e for e in eos if e < vocab_size]] = True
    official, known = eos_only.copy(), min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[i] for i in range(known)], skip_special_tokens=False)
    official[:known] |= [any(c in text for c in STOP_CHARACTERS) for text in texts]
    official.flags.writeable = eos_only.flags.writeable = False
    return official, eos_only


def rate(values: Sequence[float] | np.ndarray) -> float | None:
    """Share of true values, or mean of shares; None where there are none."""
    return float(np.mean(values)) if len(values) else None


def correct(questions: Questions, answers: Answers) -> list[bool | None]:
    """Normalized exact match of each probe; None where no answer is known."""
    pairs = zip(questions.probes, answers.texts, strict=True)
    return [None if p.target is None else matches(text, p.target) for p, text in pairs]


def figures(questions: Questions, answers: Answers) -> dict[str, float | None]:
    """Rates 0-1 of every kind of probe; capability is the mean over tasks, as the paper's is."""
    right = zip(questions.probes, correct(questions, answers), answers.full, strict=True)
    known = [(p, ok, full) for p, ok, full in right if ok is not None]
    rates = {kind: rate([ok for p, ok, _ in known if p.kind == kind]) for kind in KINDS}
    to_eos = [matches(full, str(p.target)) for p, _, full in known if p.kind == "reliability"]
    by_task: dict[str, list[bool]] = {}
    for p, ok, _ in known:
        if p.kind == CAPABILITY:
            by_task.setdefault(p.case, []).append(ok)
    tasks = [float(np.mean(v)) for v in by_task.values()]
    return {**rates, "reliability_eos_only": rate(to_eos), CAPABILITY: rate(tasks)}


def by_batch(questions: Questions, answers: Answers, batches: int) -> list[dict[str, float | None]]:
    """Reliability and generalization (0-1) of the requests of each of `batches` arrivals."""
    found: dict[tuple[int, str], list[bool]] = {}
    for p, ok in zip(questions.probes, correct(questions, answers), strict=True):
        if ok is not None:
            found.setdefault((p.batch, p.kind), []).append(ok)
    kinds = ("reliability", "generalization")
    return [{k: rate(found.get((batch, k), [])) for k in kinds} for batch in range(batches)]


def agreement(questions: Questions, before: Answers, after: Answers) -> float | None:
    """Share of locality probes whose answer did not change."""
    pairs = zip(questions.probes, before.texts, after.texts, strict=True)
    return rate([matches(b, a) for p, b, a in pairs if p.kind == "locality"])


def counts(questions: Questions) -> dict[str, int]:
    """How many probes of each kind were questions."""
    kinds = [p.kind for p in questions.probes]
    return {k: kinds.count(k) for k in (*KINDS, CAPABILITY) if k in kinds}


def predictions(questions: Questions, before: Answers | None, after: Answers | None) -> list[dict[str, Any]]:
    """Lines of predictions.jsonl; `correct` judges the later answer there is."""
    last = after or before
    assert last is not None
    right = correct(questions, last)
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
        for i, p in enumerate(questions.probes)
    ]

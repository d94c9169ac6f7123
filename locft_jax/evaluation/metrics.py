"""Probes, the stop rule and the scorer: what counts as a right answer ("WILD" protocol).

Autoregressive, greedy, at most 32 new tokens; the answer ends at `.`, a newline or EOS; then
normalized exact match.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.data.requests import EditRequest

NEW_TOKENS = 32
STOP_CHARACTERS = (".", "\n")
KINDS = ("reliability", "generalization", "locality", "portability")


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One question to the model. `target` None: no known answer, only agreement is measured."""

    case: str
    kind: str  # one of KINDS, or "capability"
    prompt: str
    target: str | None
    batch: int = 0  # of the request it belongs to


def make_probes(
    requests: Sequence[EditRequest], sample: int | None = None, seed: int = 0, trained: int = 0
) -> list[Probe]:
    """Every probe of the requests but the first `trained` rephrases of each, which the edit shows to the
    model; `sample` keeps a seeded random choice of that many of each kind."""
    probes: list[Probe] = []
    for r in requests:
        probes.append(Probe(r.case, "reliability", r.prompt, r.target_new, r.batch))
        probes += [Probe(r.case, "generalization", p, r.target_new, r.batch) for p in r.rephrases[trained:]]
        probes += [Probe(r.case, "locality", p, a, r.batch) for p, a in r.locality]
        probes += [Probe(r.case, "portability", p, a, r.batch) for p, a in r.portability]
    if sample is None:
        return probes
    rng = np.random.default_rng(seed)
    kept: list[int] = []
    for kind in KINDS:
        which = [i for i, p in enumerate(probes) if p.kind == kind]
        kept += [which[i] for i in rng.permutation(len(which))[:sample]]
    return [probes[i] for i in sorted(kept)]


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
    """(official, eos_only): which token ids end an answer, [V] bool each. A token whose text holds
    a stop character ends it officially; the text is cut at that character. Kept for the next call."""
    eos_only = np.zeros(vocab_size, bool)
    eos_only[[e for e in eos if e < vocab_size]] = True
    official = eos_only.copy()
    known = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[i] for i in range(known)], skip_special_tokens=False)
    for i, text in enumerate(texts):
        official[i] |= any(c in text for c in STOP_CHARACTERS)
    official.flags.writeable = eos_only.flags.writeable = False
    return official, eos_only


def rate(values: Sequence[bool] | np.ndarray) -> float | None:
    """Share of true values, None where there are none."""
    return float(np.mean(values)) if len(values) else None

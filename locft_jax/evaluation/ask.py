"""Ask a model every probe: greedy answers by the stop rule, and choices by log-likelihood; once (`ask`), or
again and again while an edit is running (`Dynamics`, for `eval_every`).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from locft_jax.errors import UserError
from locft_jax.evaluation.probes import NEW_TOKENS, Answers, Questions
from locft_jax.evaluation.scoring import agreement, correct, cut, figures, may_match, rate, stop_tables
from locft_jax.evaluation.verify import ProbeCache, Prompts, answer, begin_cache, score_corpus
from locft_jax.model.activation_cache import mode_for
from locft_jax.model.model import Model

SAMPLE = 200  # probes that are decoded again to see what rounding does
SHARDS = 5  # parts of the data whose reliability is reported by itself, as in the paper's figure


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
    free, probes = questions.free(), questions.probes
    prompts = _prompts(questions, free, [drafts[i] for i in free], official)
    found, verified = answer(model, prompts, row_length, on_done, cache)
    by_probe = dict(zip(free, found, strict=True))
    tokens = [by_probe.get(i, []) for i in range(len(probes))]
    said = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    texts = [cut(t) for t in said]  # a newline at the very beginning ends an answer too
    # Reliability is also reported with EOS as the only stop: where that can still be a match, go on.
    more = [i for i in free if probes[i].kind == "reliability" and not eos_only[tokens[i][-1]]]
    more = [i for i in more if may_match(said[i], str(probes[i].target))]
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
    """Room for what the passes before and after an edit at `layer` share, where the budget has it beside the
    edit's own cache over `beside` tokens; None where it has not, or where nothing is below."""
    texts = sum(len(p) + len(t) + 1 for p, t in zip(questions.prompts, questions.targets, strict=True))
    try:
        mode = mode_for(model.params, model.mesh, mode, layer, texts + beside, budgets)
    except UserError:  # the mode that was asked for holds the edit's own at most
        return None
    return ProbeCache(layer, mode) if mode != "off" else None


def rising_cache(
    model: Model, questions: Questions, drafts: Sequence[Sequence[int]], like: ProbeCache | None
) -> ProbeCache | None:
    """What `ask` with these drafts reads first, at layer 0, to be carried upward with `advance` for edits at
    one layer after another. `like`: as `probe_cache` gave it; None where it is None."""
    if like is None:
        return None
    free = questions.free()
    official, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    prompts = _prompts(questions, free, [drafts[i] for i in free], official)
    return begin_cache(prompts, model.mesh, like.mode)


def differing_share(
    model: Model, questions: Questions, answers: Answers, row_length: int, seed: int
) -> float | None:
    """In bfloat16 one pass and decoding token by token may round differently: the share (0-1) of a seeded
    sample of at most SAMPLE probes whose answer is not that of decoding all. None in float32."""
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
    """For every probe with choices, that of highest log-likelihood per character (lm-eval's `acc_norm`)."""
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
    """Drafts for the pass after an edit: edited prompts should give the target, others as before."""
    edited = [p.kind in ("reliability", "generalization") for p in questions.probes]
    known = zip(edited, questions.targets, before.tokens, strict=True)
    return [target if e else tokens for e, target, tokens in known]


class Dynamics:
    """One line for every look at a running edit: {"epoch", "step", "figures", "shards", "seconds"}. `shards`:
    reliability of each fifth of the edits, in the order of the data. `keep` is given all lines after every
    look; a run that resumes sets `lines` to those of the process before."""

    def __init__(
        self,
        model: Model,
        questions: Questions,
        before: Answers,
        row_length: int,
        cache: ProbeCache | None = None,
    ) -> None:
        self.model, self.questions, self.before = model, questions, before
        self.row_length, self.cache = row_length, cache
        self.drafts = later_drafts(questions, before)
        self.lines: list[dict[str, Any]] = []
        self.keep: Callable[[list[dict[str, Any]]], None] = lambda lines: None

    def look(self, tensors: dict[str, np.ndarray], records: Sequence[Any]) -> None:
        """Ask every probe with the site's `tensors` as they are after these steps."""
        begin, step = time.monotonic(), len(records)
        edited = self.model.with_overrides(tensors)
        after = ask(edited, self.questions, self.drafts, self.row_length, cache=self.cache)
        right = zip(self.questions.probes, correct(self.questions, after), strict=True)
        reliable = [bool(r) for p, r in right if p.kind == "reliability"]
        same = agreement(self.questions, self.before, after)
        line = {
            "epoch": records[-1].epoch,
            "step": step,
            "figures": {**figures(self.questions, after), "locality_agreement": same},
            "shards": [rate(part) for part in np.array_split(reliable, SHARDS)],
            "seconds": time.monotonic() - begin,
        }
        # Those of later steps are of a process that was killed before it saved them.
        self.lines = [*(own for own in self.lines if own["step"] < step), line]
        self.keep(self.lines)

    def seconds(self) -> float:
        """Seconds of all looks; the edit's own do not count them."""
        return sum(line["seconds"] for line in self.lines)

"""Learning dynamics: what the probes say while an edit is running (`eval_every`)."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from locft_jax.evaluation.ask import ask, later_drafts
from locft_jax.evaluation.probes import Answers, Questions
from locft_jax.evaluation.scoring import agreement, correct, figures, rate
from locft_jax.evaluation.verify import ProbeCache
from locft_jax.model.model import Model

SHARDS = 5  # parts of the data whose reliability is reported by itself, as in the paper's figure


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
        line = {
            "epoch": records[-1].epoch,
            "step": step,
            "figures": {
                **figures(self.questions, after),
                "locality_agreement": agreement(self.questions, self.before, after),
            },
            "shards": [rate(part) for part in np.array_split(reliable, SHARDS)],
            "seconds": time.monotonic() - begin,
        }
        # Those of later steps are of a process that was killed before it saved them.
        self.lines = [*(own for own in self.lines if own["step"] < step), line]
        self.keep(self.lines)

    def seconds(self) -> float:
        """Seconds of all looks; the edit's own do not count them."""
        return sum(line["seconds"] for line in self.lines)

"""Learning dynamics: what the probes say while an edit is running (`eval_every`)."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.config import Config
from locft_jax.editing.checkpointer import Checkpointer
from locft_jax.editing.trainer import StepRecord
from locft_jax.evaluation.ask import ask, later_guesses
from locft_jax.evaluation.probes import Answers, Asked
from locft_jax.evaluation.scoring import agreement, correct, figures, rate
from locft_jax.evaluation.verify import ProbeCache
from locft_jax.model.model import Model

SHARDS = 5  # parts of the data whose reliability is told by itself, as in the paper's figure


class Dynamics:
    """One line for every look at a running edit: {"epoch", "step", "figures", "shards", "seconds"}. `shards`:
    reliability of each fifth of the edits, in the order of the data. Kept with the checkpoints."""

    def __init__(
        self,
        model: Model,
        config: Config,
        asked: Asked,
        before: Answers,
        cache: ProbeCache | None,
        checkpoints: Checkpointer | None,
    ) -> None:
        self.model, self.config, self.asked, self.before = model, config, asked, before
        self.cache, self.checkpoints = cache, checkpoints
        self.guesses = later_guesses(asked, before)
        self.lines: list[dict[str, Any]] = (checkpoints and checkpoints.kept_dynamics()) or []

    def look(self, tensors: dict[str, np.ndarray], records: Sequence[StepRecord]) -> None:
        """Ask every probe with the site's `tensors` as they are after these steps."""
        begin, step = time.monotonic(), len(records)
        edits = self.model.with_overrides(tensors).overrides
        after = ask(self.model, edits, self.asked, self.guesses, self.config.row_length, kept=self.cache)
        right = correct(self.asked, after)
        edited = [bool(r) for p, r in zip(self.asked.probes, right, strict=True) if p.kind == "reliability"]
        line = {
            "epoch": records[-1].epoch,
            "step": step,
            "figures": {
                **figures(self.asked, after),
                "locality_agreement": agreement(self.asked, self.before, after),
            },
            "shards": [rate(part) for part in np.array_split(edited, SHARDS)],
            "seconds": time.monotonic() - begin,
        }
        # Those of later steps are of a process that was killed before it saved them.
        self.lines = [*(own for own in self.lines if own["step"] < step), line]
        if self.checkpoints is not None:
            self.checkpoints.keep_dynamics(self.lines)

    def seconds(self) -> float:
        """Seconds of all looks; the edit's own do not count them."""
        return sum(line["seconds"] for line in self.lines)

"""What the training loop calls: progress, metrics, evaluation in between, a profile; checkpoints too
(checkpointer.py). A hook of one's own overrides what it needs of `Hook`."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from locft_jax.editing.step import EditState
from locft_jax.errors import UserError
from locft_jax.logs import Bar


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl."""

    epoch: int  # depth-first, the number of the mini-batch
    step: int
    loss: float
    skipped: bool
    examples: int
    tokens: int  # without padding


class Hook:
    """Called by the loop; by default nothing happens."""

    def on_start(self, done: Sequence[StepRecord]) -> None:
        """The loop begins, after these steps of an earlier process."""

    def on_step(self, record: StepRecord) -> None:
        """The loss of a step is known; the device may be busy with the next one."""

    def due(self, step: int, rounds: int | None) -> bool:
        """Whether `on_state` is to be called after this step: the loop then waits for it. `rounds`: epochs
        (depth-first: mini-batches) that are complete, where this step completes one."""
        return False

    def on_state(self, state: EditState, records: Sequence[StepRecord]) -> None:
        """The state after these steps; it is donated to the next step when this returns."""

    def on_end(self) -> None:
        """The loop has ended, also where it failed."""


class Progress(Hook):
    """A bar over the steps of a run, with the loss and the rate."""

    def __init__(self, bar: Bar, edits_per_step: float, round_name: str) -> None:
        self.bar, self.edits_per_step, self.round_name = bar, edits_per_step, round_name

    def on_start(self, done: Sequence[StepRecord]) -> None:
        self.bar.skip(len(done))

    def on_step(self, record: StepRecord) -> None:
        where, rate = f"{self.round_name} {record.epoch + 1}", self.bar.rate() * self.edits_per_step
        self.bar.advance(1, f"{where}, loss {record.loss:.4f}, {rate:.0f} edits/s")


REPORTERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # what `report_to` names -> its package


def check_reporters(report_to: Sequence[str]) -> None:
    """Raise UserError where a package that `report_to` needs is not installed."""
    for name in report_to:
        if importlib.util.find_spec(REPORTERS[name]) is None:
            raise UserError(f"report_to: {name} needs a package: pip install {REPORTERS[name]}")


class Metrics(Hook):
    """Loss, skipped steps and tokens per second of every step, to `folder` (`tensorboard`, which needs no
    TensorFlow) or to the W&B project `locft-jax` (`wandb`)."""

    def __init__(self, report_to: str, folder: Path) -> None:
        self.writer: Any = None
        if report_to == "wandb":
            import wandb

            self.run = wandb.init(project="locft-jax", dir=str(folder))
        else:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(folder))

    def on_start(self, done: Sequence[StepRecord]) -> None:
        self.begin = time.monotonic()

    def on_step(self, record: StepRecord) -> None:
        before, self.begin = self.begin, time.monotonic()
        figures = {"loss": record.loss, "epoch": record.epoch, "skipped": float(record.skipped)}
        figures["tokens_per_second"] = record.tokens / max(1e-9, self.begin - before)
        if self.writer is None:
            self.run.log(figures, step=record.step)
            return
        for name, value in figures.items():
            self.writer.add_scalar(f"edit/{name}", value, record.step)

    def on_end(self) -> None:
        self.writer.close() if self.writer else self.run.finish()


class Evaluate(Hook):
    """Calls `look(tensors, records)` after every so many epochs (depth-first: mini-batches). `export`: the
    state's tensors as they would be exported."""

    def __init__(self, every: int, export: Callable[[EditState], Any], look: Callable[..., None]) -> None:
        self.every, self.export, self.look = every, export, look

    def due(self, step: int, rounds: int | None) -> bool:
        return rounds is not None and rounds % self.every == 0

    def on_state(self, state: EditState, records: Sequence[StepRecord]) -> None:
        self.look(self.export(state), records)


class Profile(Hook):
    """A `jax.profiler` trace of a few steps, the first of which are left out: they compile."""

    def __init__(self, folder: str, after: int = 2, steps: int = 5) -> None:
        self.folder, self.after, self.steps, self.begun = folder, after, steps, 0

    def on_step(self, record: StepRecord) -> None:
        if not self.begun and record.step >= self.after:
            self.begun = record.step
            jax.profiler.start_trace(self.folder)
        elif self.begun and record.step >= self.begun + self.steps:
            self.on_end()

    def on_end(self) -> None:
        if self.begun:
            self.begun, self.after = 0, 2**62
            jax.profiler.stop_trace()

"""Breadth-first editing: shuffled epochs over all edits, mini-batches, early stop.

The device never waits for the host: batches are packed and sent ahead by a thread, and a step is
dispatched before the loss of the one before it is read.
"""

import contextlib
import dataclasses
import itertools
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.tokens import Batch, Corpus, Shape, epoch_batches, fit_shape, pack
from locft_jax.editing.prefix import Source
from locft_jax.editing.step import EditState, Hyper, train_step
from locft_jax.model.sharding import replicated, rows_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Edits, Weights


class NonFiniteLoss(FloatingPointError):
    """A loss was NaN or infinite; the message names epoch, step and batch."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl. `tokens` counts useful tokens, not padding."""

    epoch: int
    step: int
    loss: float
    skipped: bool
    examples: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a breadth-first run does, apart from the model."""

    batch_size: int
    epochs: int
    seed: int
    average: str  # "example" | "token"
    row_length: int
    hyper: Hyper


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: EditState
    epoch_losses: list[float]
    records: list[StepRecord]  # of every step
    stopped: str  # "loss_floor" | "epochs"


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Send a packed batch to the mesh: rows split over `data`, target lists everywhere."""
    rows = rows_sharding(mesh, batch.index.shape[0])
    return jax.tree.map(lambda a: jax.device_put(a, rows if a.ndim == 2 else replicated(mesh)), batch)


def run_shape(corpus: Corpus, schedule: Schedule, mesh: Mesh) -> Shape:
    """The one shape that holds every batch of every epoch (they follow from the seed)."""
    batches = [b for e in range(schedule.epochs) for b in _epoch(corpus, schedule, e)]
    return fit_shape(corpus, batches, schedule.row_length, mesh.shape["data"])


def _epoch(corpus: Corpus, schedule: Schedule, epoch: int) -> Iterator[np.ndarray]:
    return epoch_batches(len(corpus), schedule.batch_size, schedule.seed, epoch)


def ahead(items: Iterator[Any], depth: int = 2) -> Generator[Any, None, None]:
    """Run an iterator in a thread, `depth` items ahead; its exceptions reach the reader, and closing
    the result stops the thread."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def offer(message: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(message, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                offer(("item", item))
            offer(("end", None))
        except BaseException as e:  # handed over, raised in the reader
            offer(("error", e))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


class Keeper(Protocol):
    """Who keeps the state of a running loop (editing/checkpoint.py)."""

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""

    def save(self, state: EditState, records: Sequence[StepRecord]) -> None:
        """Save it; the state is donated to the next step when this returns."""


def breadth_first(
    spec: ModelSpec,
    weights: Weights,
    state: EditState,
    corpus: Corpus,
    source: Source,
    schedule: Schedule,
    mesh: Mesh,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    shape: Shape | None = None,
    base: Edits = {},  # noqa: B006 (never written to)
    done: Sequence[StepRecord] = (),
    keeper: Keeper | None = None,
    preserve: Mapping[str, jax.Array] = {},  # noqa: B006 (never written to)
) -> Outcome:
    """LocFT-BF's loop (method.md, Training): at most `epochs` shuffled passes in mini-batches; stops
    when an epoch's mean loss (by example, skipped batches included) falls below the floor.

    `state` is consumed (donated). `shape` overrides `run_shape` (a larger one gives the same result);
    `base`: edits that the model already carries; `done`: the steps that led to `state`, in a run that
    goes on; `keeper` is given the state whenever it says that it is due;
    `preserve`: matrices that every update is multiplied with (editing/preserve.py).
    Raises NonFiniteLoss naming epoch, step and batch.
    """
    shape = shape or run_shape(corpus, schedule, mesh)
    everywhere = replicated(mesh)
    hyper = jax.device_put(schedule.hyper, everywhere)
    # Counts begin where a step leaves them: elsewhere, the second step would compile anew.
    state = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), state)
    per_epoch = -(-len(corpus) // schedule.batch_size)
    floor = schedule.hyper.loss_floor

    def prepare() -> Iterator[tuple[np.ndarray, Any, Batch]]:
        first = len(done) // per_epoch
        for epoch in range(first, schedule.epochs):
            made = len(done) % per_epoch if epoch == first else 0
            for which in itertools.islice(_epoch(corpus, schedule, epoch), made, None):
                batch = pack(corpus, which, shape, schedule.average)
                assert batch is not None, "run_shape saw every batch"
                array, batch = source.feed(batch)
                yield which, jax.device_put(array, everywhere), place_batch(batch, mesh)

    records = list(done)
    pending: tuple[np.ndarray, jax.Array] | None = None

    def read() -> None:
        """Wait for the loss of the step that was dispatched last, and record it."""
        nonlocal pending
        if pending is None:
            return
        (which, loss), pending = pending, None
        epoch, value = len(records) // per_epoch, float(jax.device_get(loss))
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"the loss is {value} in epoch {epoch + 1}, step {len(records) + 1}, over the edits "
                f"{', '.join(map(str, which[:8]))}{', ...' if len(which) > 8 else ''} (counted from 0); "
                "a smaller lr, or weights and data without NaN or infinity, would be right"
            )
        tokens = int(corpus.lengths[which].sum())
        record = StepRecord(epoch, len(records) + 1, value, value < floor, len(which), tokens)
        records.append(record)
        on_step(record)

    with contextlib.closing(ahead(prepare())) as batches:
        for step, (which, array, batch) in enumerate(batches, len(done) + 1):
            if step > 1 and (step - 1) % per_epoch == 0:  # the first of another epoch
                read()
                if mean_loss(records[-per_epoch:]) < floor:
                    break
            state, loss = train_step(spec, source.layer, hyper, state, weights, base, array, batch, preserve)
            read()  # of the step before: the device is busy with this one
            pending = which, loss
            if keeper is not None and keeper.due(step):
                read()
                keeper.save(state, records)
    read()
    losses = [mean_loss(records[i : i + per_epoch]) for i in range(0, len(records), per_epoch)]
    stopped = "loss_floor" if losses and losses[-1] < floor else "epochs"
    return Outcome(state, losses, records, stopped)


def mean_loss(records: Sequence[StepRecord]) -> float:
    """Mean loss by example of an epoch's steps, skipped ones included (nats)."""
    return sum(r.loss * r.examples for r in records) / sum(r.examples for r in records)

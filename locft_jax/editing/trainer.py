"""The training loop: mini-batches breadth-first (shuffled epochs over all edits, early stop) or depth-first
(each mini-batch to convergence in turn, one pass), with hooks. The device never waits for the host: a thread
packs and sends batches ahead, and a step is dispatched before the loss of the one before it is read."""

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import Batch, Corpus, Shape, epoch_batches, fit_shape, pack
from locft_jax.editing.hooks import Hook, StepRecord
from locft_jax.editing.step import EditState, Hyper, Regularizers, train_step
from locft_jax.model.activation_cache import Inputs, Source
from locft_jax.model.sharding import place, replicated
from locft_jax.model.weights import Params


class NonFiniteLoss(FloatingPointError):
    """A loss is NaN or infinite; the message names epoch, step and batch."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a run does, apart from the model."""

    batch_size: int
    epochs: int  # depth-first: steps on a mini-batch, at most
    seed: int
    average: str  # "example" | "token"
    row_length: int
    hyper: Hyper
    pipeline: str = "breadth"  # | "depth"


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a run of the loop reads and never changes."""

    params: Params  # their overrides: edits that the model already carries
    mesh: Mesh
    corpus: Corpus
    source: Source
    schedule: Schedule
    regularizers: Callable[[int], Regularizers] = lambda visit: Regularizers()  # beside mini-batch `visit`
    shape: Shape | None = None  # of the packed batches; None: `run_shape`


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: EditState
    epoch_losses: list[float]  # depth-first: the last loss of every mini-batch
    records: list[StepRecord]  # of every step
    stopped: str  # "loss_floor" | "epochs"


@dataclasses.dataclass(frozen=True)
class Visit:
    """A mini-batch that the run comes to."""

    which: np.ndarray  # numbers of its edits
    round: int  # the epoch; depth-first, the number of the mini-batch
    first: bool = True  # of its round
    last: bool = True
    steps: int = 1  # at most


def visits(corpus: Corpus, schedule: Schedule) -> Iterator[Visit]:
    """The mini-batches of every epoch, shuffled anew; depth-first, each once, in the order of the data."""
    count, size = corpus.edits, schedule.batch_size
    if schedule.pipeline == "depth":
        for n, start in enumerate(range(0, count, size)):
            yield Visit(np.arange(start, min(start + size, count)), n, steps=schedule.epochs)
        return
    for epoch in range(schedule.epochs):
        batches = list(epoch_batches(count, size, schedule.seed, epoch))
        for n, which in enumerate(batches):
            yield Visit(which, epoch, n == 0, n == len(batches) - 1)


def run_shape(corpus: Corpus, schedule: Schedule, mesh: Mesh) -> Shape:
    """The one shape that holds every batch of the run (they follow from the seed)."""
    batches = [corpus.examples_of(visit.which) for visit in visits(corpus, schedule)]
    return fit_shape(corpus, batches, schedule.row_length, mesh.shape["data"])


def _resume_point(schedule: Schedule, done: Sequence[StepRecord]) -> tuple[int, int]:
    """Where a run resumes after these steps: (visit, steps made on its mini-batch)."""
    if schedule.pipeline == "breadth" or not done:
        return len(done), 0
    visit = done[-1].epoch
    made = sum(r.epoch == visit for r in done)
    return (visit + 1, 0) if done[-1].skipped or made == schedule.epochs else (visit, made)


def batches(job: Job, first: int) -> Iterator[tuple[Visit, Inputs, Batch, Regularizers]]:
    """Every visit from number `first` on, packed and on the mesh."""
    shape = job.shape or run_shape(job.corpus, job.schedule, job.mesh)
    for number, visit in enumerate(itertools.islice(visits(job.corpus, job.schedule), first, None), first):
        batch = pack(job.corpus, job.corpus.examples_of(visit.which), shape, job.schedule.average)
        assert batch is not None, "run_shape saw every batch"
        yield visit, *job.source.feed(batch, job.mesh), job.regularizers(number)


def ahead(items: Iterator[Any], depth: int = 2) -> Generator[Any, None, None]:
    """Run an iterator in a thread, `depth` items ahead; the reader gets its exceptions, closing stops it."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = collections.deque(pool.submit(next, items, end) for _ in range(depth))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(pool.submit(next, items, end))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


class _Log:
    """Records of the steps made, one step behind the device."""

    def __init__(self, job: Job, done: Sequence[StepRecord], hooks: Sequence[Hook]) -> None:
        self.job, self.hooks, self.records = job, hooks, list(done)
        self.pending: tuple[Visit, jax.Array] | None = None

    @property
    def steps(self) -> int:
        return len(self.records) + (self.pending is not None)

    def read(self, dispatched: tuple[Visit, jax.Array] | None = None) -> None:
        """Wait for the loss of the step that was dispatched last, and record it, while the device is busy
        with the one `dispatched` now."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self._record(*pending)
        self.pending = dispatched

    def _record(self, visit: Visit, loss: jax.Array) -> None:
        value, which, corpus = float(jax.device_get(loss)), visit.which, self.job.corpus
        if not math.isfinite(value):
            what = "mini-batch" if self.job.schedule.pipeline == "depth" else "epoch"
            raise NonFiniteLoss(
                f"the loss is {value} in {what} {visit.round + 1}, step {self.steps + 1}, over the edits "
                f"{', '.join(map(str, which[:8]))}{', ...' if len(which) > 8 else ''} (from 0 on); use a "
                "smaller learning_rate, or weights and data without NaN or infinity"
            )
        tokens = int(corpus.lengths[corpus.examples_of(which)].sum())
        skipped = value < self.job.schedule.hyper.loss_floor
        self.records.append(StepRecord(visit.round, self.steps + 1, value, skipped, len(which), tokens))
        for hook in self.hooks:
            hook.on_step(self.records[-1])


def train(job: Job, state: EditState, done: Sequence[StepRecord] = (), hooks: Sequence[Hook] = ()) -> Outcome:
    """The editing loop, from `state` (donated), to which the steps `done` of a run that resumes led. Raises
    NonFiniteLoss, and what hooks (called in their order) raise. Breadth-first: at most `epochs` shuffled
    passes; stops when an epoch's mean loss (by example, skipped batches included) falls below the floor.
    Depth-first: one pass in the order of the data; every mini-batch begins with a fresh Adam and gets at most
    `epochs` steps, the last of them the one whose loss is below the floor (a skip)."""
    schedule, log = job.schedule, _Log(job, done, hooks)
    depth, floor = schedule.pipeline == "depth", schedule.hyper.loss_floor
    everywhere = replicated(job.mesh)
    hyper = jax.tree.map(lambda a: place(a, everywhere), schedule.hyper)
    # Counts begin where a step leaves them: elsewhere, the second step would compile anew.
    state = jax.tree.map(lambda a: a if a.ndim else place(a, everywhere), state)
    adam = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state.optimizer)
    where = jax.tree.map(lambda a: a.sharding, state.optimizer)
    fresh = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), adam), out_shardings=where)
    first, made = _resume_point(schedule, done)
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.on_end)
            hook.on_start(done)
        ready = stack.enter_context(contextlib.closing(ahead(batches(job, first))))
        for visit, *inputs, regularizers in ready:
            if visit.first and log.steps and not depth:
                log.read()
                if mean_loss([r for r in log.records if r.epoch == visit.round - 1]) < floor:
                    break
            if depth and not made:
                state = EditState(state.theta, fresh())
            for n in range(made, visit.steps):
                state, loss = train_step(hyper, state, job.params, *inputs, regularizers)
                log.read((visit, loss))
                if depth:  # the loss says which step comes next
                    log.read()
                complete = visit.last and (not depth or log.records[-1].skipped or n + 1 == visit.steps)
                for hook in [h for h in hooks if h.due(log.steps, visit.round + 1 if complete else None)]:
                    log.read()
                    hook.on_state(state, log.records)
                if depth and complete:
                    break
            made = 0
        log.read()
    rounds = [list(own) for _, own in itertools.groupby(log.records, lambda r: r.epoch)]
    losses = [mean_loss(own[-1:] if depth else own) for own in rounds]
    ended = losses if depth else losses[-1:]
    return Outcome(state, losses, log.records, "loss_floor" if ended and max(ended) < floor else "epochs")


def mean_loss(records: Sequence[StepRecord]) -> float:
    """Mean loss by example of an epoch's steps, skipped ones included (nats)."""
    return sum(r.loss * r.examples for r in records) / sum(r.examples for r in records)

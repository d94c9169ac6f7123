"""The loop over mini-batches: breadth-first (shuffled epochs over all edits, early stop) or depth-first
(each mini-batch to convergence in turn, one pass).

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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import Batch, Corpus, Shape, epoch_batches, fit_shape, pack
from locft_jax.editing.step import EditState, Hyper, Kept, Sides, train_step
from locft_jax.model.activation_cache import Source
from locft_jax.model.sharding import place, replicated, rows_sharding, source_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights


class NonFiniteLoss(FloatingPointError):
    """A loss was NaN or infinite; the message names epoch, step and batch."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl. `epoch`: depth-first, the number of the mini-batch. `tokens` counts useful
    tokens, not padding."""

    epoch: int
    step: int
    loss: float
    skipped: bool
    examples: int
    tokens: int


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
    eval_every: int = 1  # epochs, or mini-batches, between two looks at the state


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: EditState
    epoch_losses: list[float]  # depth-first: the last loss of every mini-batch
    records: list[StepRecord]  # of every step
    stopped: str  # "loss_floor" | "epochs"


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Where the arrays of a packed batch lie: rows split over `data`, target lists everywhere."""
    rows = rows_sharding(mesh, batch.index.shape[0])
    return jax.tree.map(lambda a: rows if a.ndim == 2 else replicated(mesh), batch)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Send a packed batch to the mesh."""
    return jax.tree.map(place, batch, batch_shardings(batch, mesh))


def run_shape(corpus: Corpus, schedule: Schedule, mesh: Mesh) -> Shape:
    """The one shape that holds every batch of the run (they follow from the seed)."""
    batches = [corpus.examples_of(which) for which in _visits(corpus, schedule)]
    return fit_shape(corpus, batches, schedule.row_length, mesh.shape["data"])


def _visits(corpus: Corpus, schedule: Schedule) -> Iterator[np.ndarray]:
    """The mini-batches of edits as the run comes to them: those of every epoch (breadth-first), or each
    once, in the order of the data (depth-first)."""
    count, size = corpus.edits, schedule.batch_size
    if schedule.pipeline == "depth":
        yield from (np.arange(start, min(start + size, count)) for start in range(0, count, size))
        return
    for epoch in range(schedule.epochs):
        yield from epoch_batches(count, size, schedule.seed, epoch)


def _position(schedule: Schedule, done: Sequence[StepRecord]) -> tuple[int, int]:
    """Where a run goes on after these steps: (visit, steps made on its mini-batch)."""
    if schedule.pipeline == "breadth" or not done:
        return len(done), 0
    visit = done[-1].epoch
    made = sum(r.epoch == visit for r in done)
    return (visit + 1, 0) if done[-1].skipped or made == schedule.epochs else (visit, made)


def _fresh(optimizer: Any) -> Callable[[], Any]:
    """Makes Adam's state before its first step, where `optimizer` lies."""
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), optimizer)
    return jax.jit(
        lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like),
        out_shardings=jax.tree.map(lambda a: a.sharding, optimizer),
    )


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


# Given the state after some epochs (depth-first: mini-batches) and the records of every step before.
Watch = Callable[[EditState, Sequence[StepRecord]], None]


def run_pipeline(
    spec: ModelSpec,
    weights: Weights,
    state: EditState,
    corpus: Corpus,
    source: Source,
    schedule: Schedule,
    mesh: Mesh,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    shape: Shape | None = None,
    base: Overrides = {},  # noqa: B006 (never written to)
    done: Sequence[StepRecord] = (),
    keeper: Keeper | None = None,
    preserve: Mapping[str, Sides] = {},  # noqa: B006 (never written to)
    keep: Callable[[int], Kept | None] = lambda visit: None,
    watch: Watch | None = None,
) -> Outcome:
    """The editing loop (method.md, Training). Breadth-first, LocFT-BF's: at most `epochs` shuffled passes
    in mini-batches; stops when an epoch's mean loss (by example, skipped batches included) falls below
    the floor. Depth-first: one pass in the order of the data; every mini-batch begins with a fresh Adam
    and gets at most `epochs` steps, the last of them the one whose loss is below the floor (a skip).

    `state` is consumed (donated). `shape` overrides `run_shape` (a larger one gives the same result);
    `base`: edits that the model already carries; `done`: the steps that led to `state`, in a run that
    goes on; `keeper` is given the state whenever it says that it is due;
    `preserve`: matrices that every update is multiplied with (editing/preserve.py); `keep`: the number of a
    mini-batch that the run comes to -> the retained texts beside it, on the mesh (editing/keep.py);
    `watch` is given the state after every `eval_every` epochs (depth-first: mini-batches).
    Raises NonFiniteLoss naming epoch, step and batch.
    """
    shape = shape or run_shape(corpus, schedule, mesh)
    everywhere = replicated(mesh)
    hyper = jax.tree.map(lambda a: place(a, everywhere), schedule.hyper)
    # Counts begin where a step leaves them: elsewhere, the second step would compile anew.
    state = jax.tree.map(lambda a: a if a.ndim else place(a, everywhere), state)
    depth = schedule.pipeline == "depth"
    per_epoch = 1 if depth else -(-corpus.edits // schedule.batch_size)  # visits
    floor = schedule.hyper.loss_floor
    first, made = _position(schedule, done)
    fresh = _fresh(state.optimizer)

    def prepare() -> Iterator[tuple[np.ndarray, Any, Batch, Kept | None]]:
        for visit, which in enumerate(itertools.islice(_visits(corpus, schedule), first, None), first):
            batch = pack(corpus, corpus.examples_of(which), shape, schedule.average)
            assert batch is not None, "run_shape saw every batch"
            array, batch = source.feed(batch)
            array = place(array, source_sharding(mesh, array.shape))
            yield which, array, place_batch(batch, mesh), keep(visit)

    records = list(done)
    pending: tuple[int, np.ndarray, jax.Array] | None = None

    def read() -> None:
        """Wait for the loss of the step that was dispatched last, and record it."""
        nonlocal pending
        if pending is None:
            return
        (epoch, which, loss), pending = pending, None
        value = float(jax.device_get(loss))
        if not math.isfinite(value):
            what = "mini-batch" if depth else "epoch"
            raise NonFiniteLoss(
                f"the loss is {value} in {what} {epoch + 1}, step {len(records) + 1}, over the edits "
                f"{', '.join(map(str, which[:8]))}{', ...' if len(which) > 8 else ''} (counted from 0); "
                "a smaller lr, or weights and data without NaN or infinity, would be right"
            )
        tokens = int(corpus.lengths[corpus.examples_of(which)].sum())
        record = StepRecord(epoch, len(records) + 1, value, value < floor, len(which), tokens)
        records.append(record)
        on_step(record)

    with contextlib.closing(ahead(prepare())) as batches:
        for visit, (which, array, batch, kept) in enumerate(batches, first):
            if not depth and visit and visit % per_epoch == 0:  # the first of another epoch
                read()
                if mean_loss(records[-per_epoch:]) < floor:
                    break
            if depth and not made:
                state = EditState(state.theta, fresh())
            for n in range(made, schedule.epochs if depth else 1):
                state, loss = train_step(
                    spec, source.layer, hyper, state, weights, base, array, batch, preserve, kept
                )
                read()  # of the step before: the device is busy with this one
                pending = visit // per_epoch, which, loss
                due = keeper is not None and keeper.due(len(records) + 1)
                looks = watch is not None and (visit + 1) % (per_epoch * schedule.eval_every) == 0
                if depth or due or looks:  # depth-first, the loss says which step comes next
                    read()
                ends = depth and (records[-1].skipped or n + 1 == schedule.epochs)
                if watch is not None and looks and ends == depth:
                    watch(state, records)  # before it is saved: what is saved has been looked at
                if keeper is not None and due:
                    keeper.save(state, records)
                if ends:
                    break
            made = 0
    read()
    losses = [mean_loss(own) for own in _rounds(records, depth)]
    ended = losses if depth else losses[-1:]
    return Outcome(state, losses, records, "loss_floor" if ended and max(ended) < floor else "epochs")


def _rounds(records: Sequence[StepRecord], depth: bool) -> Iterator[Sequence[StepRecord]]:
    """The steps of every epoch; depth-first, the last step of every mini-batch."""
    for _, group in itertools.groupby(records, lambda r: r.epoch):
        own = list(group)
        yield own[-1:] if depth else own


def mean_loss(records: Sequence[StepRecord]) -> float:
    """Mean loss by example of an epoch's steps, skipped ones included (nats)."""
    return sum(r.loss * r.examples for r in records) / sum(r.examples for r in records)

"""The programs of an edit on a mesh, before there is anything to run them on.

Nothing is computed and no array exists: shapes and shardings stand in for weights, state and batches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from locft_jax.data.packing import (
    Batch,
    Rows,
    corpus_from_lists,
    epoch_batches,
    even_rows,
    few_sizes,
    fit_shape,
    pack,
)
from locft_jax.editing.regularizers.kl import TEXTS, TOP
from locft_jax.editing.regularizers.preconditioner import side_shardings
from locft_jax.editing.regularizers.second_moments import EXACT, RANK, matrices_of
from locft_jax.editing.regularizers.texts import SAMPLE_LENGTH
from locft_jax.editing.regularizers.texts import source_of as source
from locft_jax.editing.run import schedule_of
from locft_jax.editing.step import (
    EditState,
    Hyper,
    LowRank,
    Regularizers,
    RetainBatch,
    Sides,
    init_state,
    train_step,
)
from locft_jax.editing.trainer import run_shape
from locft_jax.evaluation.probes import NEW_TOKENS
from locft_jax.evaluation.verify import packed
from locft_jax.model.activation_cache import Inputs, cache_pass, choose_mode
from locft_jax.model.decode import MOST, abstract_slots, decode, read_batch
from locft_jax.model.sharding import (
    batch_shardings,
    replicated,
    rows_sharding,
    source_sharding,
    tensor_sharding,
    weight_shardings,
    width_split,
)
from locft_jax.model.weights import Params, Weights, abstract_weights, locate_tensor
from locft_jax.studies.plan.case import Case
from locft_jax.studies.plan.cost import Size, Work, forward_work, train_work

PREFIX_ROWS = 32  # packed rows of a prefix pass, as `cached_source` makes them


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run. `weights`, `tuned`: bytes a chip among its arguments; `beside`: what the run
    keeps on a chip meanwhile that is no argument of it."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    weights: int
    tuned: int
    beside: int
    work: Work


def shaped(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array that lies somewhere, without its values."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def frozen(case: Case, mesh: Mesh) -> Weights:
    """The frozen weights' shapes on a mesh."""
    shapes = abstract_weights(case.spec, case.dtype, case.int8)
    where = weight_shardings(mesh, case.spec, case.int8)
    return jax.tree.map(lambda a, s: shaped(a.shape, a.dtype, s), shapes, where)


def tuned(case: Case, mesh: Mesh) -> EditState:
    """The tuned state's shapes on a mesh: moments lie as their tensors, counts everywhere."""
    rows = {n: locate_tensor(case.spec, n)[0] for n in case.site}
    where = {n: tensor_sharding(mesh, case.spec, row, stacked=False) for n, row in rows.items()}
    theta = {n: jax.ShapeDtypeStruct(row.shape, np.float32) for n, row in rows.items()}

    def place(path: tuple[Any, ...], a: Any) -> jax.ShapeDtypeStruct:
        name = next((k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in where), None)
        return shaped(a.shape, a.dtype, replicated(mesh) if name is None else where[name])

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init_state, theta))


def chip_bytes(tree: Any) -> int:
    """Bytes of the arrays' shards on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def unread(weights: Weights, *keys: str) -> int:
    """Bytes on one device of weights that a program does not read: `jax.jit` leaves them out of its
    arguments. (Tied, the embedding is the head too.)"""
    return chip_bytes([weights[k] for k in keys if k in weights and (k != "embed" or "head" in weights)])


def placed(batch: Batch, mesh: Mesh) -> Batch:
    """The shapes of a packed batch on a mesh, as `place_batch` sends it."""
    return jax.tree.map(lambda a, s: shaped(a.shape, a.dtype, s), batch, batch_shardings(batch, mesh))


def cache_mode(case: Case, mesh: Mesh, free: float) -> str:
    """Where the run keeps its activations below the site, where a device has `free` bytes left."""
    budget = case.config.memory_budget
    device = 0.8 * max(0.0, free) if budget is None else budget * 2**30
    size = case.tokens * case.spec.d_model * case.dtype.itemsize
    split = width_split(mesh, case.spec.d_model)
    return choose_mode(case.config.activation_cache, case.layer, size, (device, float("inf")), split)


def programs(case: Case, mesh: Mesh, memory: float) -> list[Program]:
    """The programs of an edit on a mesh of chips with `memory` bytes each."""
    weights, state = frozen(case, mesh), tuned(case, mesh)
    held = {"weights": chip_bytes(weights), "tuned": chip_bytes(state)}
    mode = cache_mode(case, mesh, memory - sum(held.values()))
    found = [train_program(case, mesh, weights, state, mode)]
    if mode != "off":
        found.append(prefix_program(case, mesh, weights, chip_bytes(state)))
    if case.config.evaluate:
        found += evaluation_programs(case, mesh, weights, state)
    return found


def sides(case: Case, mesh: Mesh) -> dict[str, Sides]:
    """The matrices that updates are multiplied with."""
    if case.config.preserve == "none":
        return {}
    made: dict[str, Sides] = {}
    for name in matrices_of(case.spec, case.site):
        (out, width), (columns, rows) = (
            locate_tensor(case.spec, name)[0].shape,
            side_shardings(mesh, case.spec, name),
        )
        other = side(out, rows, mesh) if case.config.preserve == "kfac" else None
        made[name] = side(width, columns, mesh), other
    return made


def side(width: int, sharding: NamedSharding, mesh: Mesh) -> Any:
    """P of inputs, or outputs, of this width."""
    if width <= EXACT:
        return shaped((width, width), np.float32, sharding)
    return LowRank(shaped((width, RANK), np.float32, sharding), shaped((RANK,), np.float32, replicated(mesh)))


def kept(case: Case, mesh: Mesh, start: int, mode: str) -> RetainBatch | None:
    """A mini-batch of retained texts: as long as those sampled from the model can be, else as the edits'
    prompts."""
    if not case.config.preserve_kl:
        return None
    lengths = case.corpus.target_start[:TEXTS]
    if source(case.config) == "model":
        lengths = np.full(TEXTS, min(SAMPLE_LENGTH, case.config.row_length))
    starts = lengths if case.config.preserve_tokens == "last" else np.ones(len(lengths))
    corpus = corpus_from_lists([np.zeros(n + 1, np.int32) for n in lengths], starts)
    every = np.arange(len(corpus))
    packed_batch = pack(
        corpus, every, fit_shape(corpus, [every], case.config.row_length, mesh.shape["data"]), "token"
    )
    assert packed_batch is not None, "fit_shape saw it"
    batch, everywhere = placed(packed_batch, mesh), replicated(mesh)
    targets, top = batch.labels.size, min(TOP, case.spec.vocab_size - 1)
    return RetainBatch(
        Inputs(source_of(case, mesh, start, mode, batch), start),
        batch,
        shaped((targets, top), np.int32, everywhere),
        shaped((targets, top), np.float32, everywhere),
        shaped((targets,), np.float32, everywhere),
        shaped((), np.float32, everywhere),
    )


def source_of(case: Case, mesh: Mesh, start: int, mode: str, batch: Batch) -> Any:
    """What a step looks a batch's inputs up in: of the corpus on the device, else of the batch alone."""
    if start == 0:
        return shaped((case.tokens,), np.int32, replicated(mesh))
    slots, d = case.tokens if mode == "device" else batch.index.size, case.spec.d_model
    return shaped((slots, d), case.dtype, source_sharding(mesh, (slots, d)))


def train_program(case: Case, mesh: Mesh, weights: Weights, state: EditState, mode: str) -> Program:
    """The training step on mini-batches as the run makes them."""
    schedule = dataclasses.replace(schedule_of(case.config), epochs=1)
    which = next(epoch_batches(len(case.corpus), case.config.batch_size, case.config.seed, 0))
    packed_batch = pack(case.corpus, which, run_shape(case.corpus, schedule, mesh))
    assert packed_batch is not None, "run_shape saw the first mini-batch"
    batch, start = placed(packed_batch, mesh), 0 if mode == "off" else case.layer
    source = source_of(case, mesh, start, mode, batch)
    more = Regularizers(sides(case, mesh), kept(case, mesh, start, mode))
    number: Any = shaped((), np.float32, replicated(mesh))
    hyper = Hyper(number, number, number, None if case.config.norm_constraint is None else number)
    size = Size(batch.index.size, batch.index.shape[1], batch.labels.size, case.dtype.itemsize)
    held, own = chip_bytes(weights), chip_bytes(state)
    return Program(
        "train step",
        lambda: train_step.lower(hyper, state, Params(case.spec, weights), Inputs(source, start), batch, more),
        held,
        own,
        unread(weights, "embed") if start else 0,
        train_work(case.spec, mesh.shape, case.site, start, size, held, own),
    )


def prefix_program(case: Case, mesh: Mesh, weights: Weights, beside: int) -> Program:
    """The pass that fills the prefix cache; the tuned state is there already."""
    length, rows = even_rows(case.corpus, case.config.row_length, PREFIX_ROWS, mesh.shape["data"])
    grid = shaped((rows, length), np.int32, rows_sharding(mesh, rows))
    size = Size(rows * length, length, 0, case.dtype.itemsize)
    held = chip_bytes(weights)
    return Program(
        "prefix pass",
        lambda: cache_pass.lower(case.layer, Params(case.spec, weights), grid, Rows(grid, grid)),
        held,
        0,
        beside + unread(weights, "norm", "head"),
        forward_work(case.spec, mesh.shape, case.layer, size, held),
    )


def evaluation_programs(case: Case, mesh: Mesh, weights: Weights, state: EditState) -> list[Program]:
    """The teacher-forced pass over the edited prompts, and one decoding step of a full pool."""
    spec, everywhere = case.spec, replicated(mesh)
    edits: Any = {n: shaped(a.shape, case.dtype, a.sharding) for n, a in state.theta.items()}
    params = Params(spec, weights, edits)
    _, first = next(packed(case.corpus, np.arange(len(case.corpus)), case.config.row_length, mesh))
    batch, ids = placed(first, mesh), shaped((case.tokens,), np.int32, everywhere)
    slots = few_sizes(int(case.corpus.lengths.max()), 32, 1)
    pool = abstract_slots(params, mesh, few_sizes(MOST, 16, 4), slots, NEW_TOKENS - 1)
    stop, enough = shaped((spec.vocab_size,), np.bool_, everywhere), shaped((), np.int32, everywhere)
    held, own, cache = chip_bytes(weights), chip_bytes(edits), chip_bytes((pool.keys, pool.values))
    reading = Size(batch.index.size, batch.index.shape[1], batch.labels.size, case.dtype.itemsize)
    step = Size(MOST, slots + NEW_TOKENS - 1, MOST, case.dtype.itemsize)
    return [
        Program(
            "evaluation pass",
            lambda: read_batch.lower(case.layer, params, ids, batch),
            held,
            own,
            cache,
            forward_work(spec, mesh.shape, spec.n_layers, reading, held),
        ),
        Program(
            "decoding step",
            lambda: decode.lower(params, pool, stop, enough),
            held,
            own,
            0,
            forward_work(spec, mesh.shape, spec.n_layers, step, held, cache),
        ),
    ]

"""The programs of an edit on a mesh, before there is anything to run them on.

Nothing is computed and no array exists: shapes and shardings stand in for weights, state and batches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import Mesh, NamedSharding

from locft_jax.data import packing
from locft_jax.data.packing import Batch, Corpus, Rows, Shape
from locft_jax.editing import step
from locft_jax.editing.regularizers import kl, second_moments, texts
from locft_jax.editing.regularizers.preconditioner import side_shardings
from locft_jax.editing.run import schedule_of
from locft_jax.editing.step import EditState
from locft_jax.editing.trainer import run_shape, visits
from locft_jax.evaluation.probes import NEW_TOKENS
from locft_jax.evaluation.verify import packed
from locft_jax.model import activation_cache, decode, sharding
from locft_jax.model.activation_cache import Inputs
from locft_jax.model.sharding import replicated
from locft_jax.model.weights import Params, Weights, abstract_weights, locate_tensor
from locft_jax.studies.plan.case import Case


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run. `weights`, `tuned`: bytes a chip among its arguments; `beside`: what the run
    keeps on a chip meanwhile that is no argument of it."""

    name: str
    trace: Callable[[], Any]  # -> jax.stages.Traced
    weights: int
    tuned: int
    beside: int = 0


def product_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of a traced program's matrix products, on all chips together. (The compiler's `cost_analysis`
    counts the body of a loop, which here is every layer but a few, once.) Of an open loop: one turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            left: Any = eqn.invars[0].aval
            out: Any = eqn.outvars[0].aval
            total += 2 * out.size * math.prod(left.shape[i] for i in summed)
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]  # closed ones hold an open one
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += turns * sum(product_flops(j) for j in inner if hasattr(j, "eqns"))
    return total


def shaped(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """An array on devices, without its values."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def on(tree: Any, shardings: Any) -> Any:
    """A tree of arrays or shapes as shapes with these shardings."""
    return jax.tree.map(lambda a, s: shaped(a.shape, a.dtype, s), tree, shardings)


def frozen(case: Case, mesh: Mesh) -> Weights:
    """The frozen weights' shapes on a mesh."""
    weights = abstract_weights(case.spec, case.dtype, case.int8)
    return on(weights, sharding.weight_shardings(mesh, case.spec, case.int8))


def tuned(case: Case, mesh: Mesh) -> EditState:
    """The tuned state's shapes on a mesh: moments are sharded as their tensors, counts replicated."""
    rows = {n: locate_tensor(case.spec, n)[0] for n in case.site}
    where = {n: sharding.tensor_sharding(mesh, case.spec, row, stacked=False) for n, row in rows.items()}
    theta = {n: jax.ShapeDtypeStruct(row.shape, np.float32) for n, row in rows.items()}

    def place(path: tuple[Any, ...], a: Any) -> Any:
        names = (k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in where)
        return shaped(a.shape, a.dtype, where.get(next(names, ""), replicated(mesh)))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(step.init_state, theta))


def chip_bytes(tree: Any) -> int:
    """Bytes of the arrays' shards on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def unread(weights: Weights, *keys: str) -> int:
    """Bytes on one device of weights that a program does not read: `jax.jit` leaves them out of its
    arguments. Tied, the embedding is the head too."""
    return chip_bytes([weights[k] for k in keys if k in weights and (k != "embed" or "head" in weights)])


def placed(batch: Batch, mesh: Mesh) -> Batch:
    """The shapes of a packed batch on a mesh, as `place_batch` sends it."""
    return on(batch, sharding.batch_shardings(batch, mesh))


def cache_mode(case: Case, mesh: Mesh, free: float) -> str:
    """Where the run keeps its activations below the site, where a device has `free` bytes left."""
    budget = case.config.memory_budget
    device = 0.8 * max(0.0, free) if budget is None else budget * 2**30
    size, budgets = case.tokens * case.spec.d_model * case.dtype.itemsize, (device, float("inf"))
    split = sharding.width_split(mesh, case.spec.d_model)
    return activation_cache.choose_mode(case.config.activation_cache, case.layer, size, budgets, split)


def programs(case: Case, mesh: Mesh, memory: float) -> list[Program]:
    """The programs of an edit on a mesh of chips with `memory` bytes each."""
    weights, state = frozen(case, mesh), tuned(case, mesh)
    mode = cache_mode(case, mesh, memory - chip_bytes(weights) - chip_bytes(state))
    found = [train_program(case, mesh, weights, state, mode)]
    if mode != "off":
        found.append(cache_program(case, mesh, weights, chip_bytes(state)))
    if case.config.evaluate:
        found += evaluation_programs(case, mesh, weights, state)
    return found


def sides(case: Case, mesh: Mesh) -> dict[str, step.Sides]:
    """The matrices that updates are multiplied with."""
    config, made = case.config, dict[str, step.Sides]()
    for name in second_moments.matrices_of(case.spec, case.site) if config.preserve != "none" else ():
        out, width = locate_tensor(case.spec, name)[0].shape
        columns, rows = side_shardings(mesh, case.spec, name)
        made[name] = side(width, columns, mesh), side(out, rows, mesh) if config.preserve == "kfac" else None
    return made


def side(width: int, where: NamedSharding, mesh: Mesh) -> Any:
    """P of inputs, or outputs, of this width."""
    if width <= second_moments.EXACT:
        return shaped((width, width), np.float32, where)
    rank, damp = second_moments.RANK, shaped((second_moments.RANK,), np.float32, replicated(mesh))
    return step.LowRank(shaped((width, rank), np.float32, where), damp)


def retain_batch(case: Case, mesh: Mesh, start: int, mode: str) -> step.RetainBatch | None:
    """A mini-batch of retained texts: as long as those sampled from the model can be, else as the edits'
    prompts."""
    config, length = case.config, case.config.row_length
    if not config.preserve_kl:
        return None
    lengths = case.corpus.target_start[: kl.TEXTS]
    if texts.source_of(config) == "model":
        lengths = np.full(kl.TEXTS, min(texts.SAMPLE_LENGTH, length))
    starts = lengths if config.preserve_tokens == "last" else np.ones(len(lengths))
    corpus = packing.corpus_from_lists([np.zeros(n + 1, np.int32) for n in lengths], starts)
    every = np.arange(len(corpus))
    shape = packing.fit_shape(corpus, [every], length, mesh.shape["data"])
    batch, everywhere = packed_batch(corpus, every, shape, mesh, "token"), replicated(mesh)
    targets, top = batch.labels.size, min(kl.TOP, case.spec.vocab_size - 1)
    return step.RetainBatch(
        inputs_of(case, mesh, start, mode, batch),
        batch,
        shaped((targets, top), np.int32, everywhere),
        shaped((targets, top), np.float32, everywhere),
        shaped((targets,), np.float32, everywhere),
        shaped((), np.float32, everywhere),
    )


def packed_batch(corpus: Corpus, which: Any, shape: Shape, mesh: Mesh, average: str = "example") -> Batch:
    """The shapes of one packed batch of these texts on a mesh."""
    batch = packing.pack(corpus, which, shape, average)
    assert batch is not None, "the shape was made for it"
    return placed(batch, mesh)


def inputs_of(case: Case, mesh: Mesh, start: int, mode: str, batch: Batch) -> Inputs:
    """What a step looks a batch up in: of the corpus on the device, else of the batch alone."""
    if start == 0:
        return Inputs(shaped((case.tokens,), np.int32, replicated(mesh)), 0)
    shape = case.tokens if mode == "device" else batch.index.size, case.spec.d_model
    return Inputs(shaped(shape, case.dtype, sharding.source_sharding(mesh, shape)), start)


def train_program(case: Case, mesh: Mesh, weights: Weights, state: EditState, mode: str) -> Program:
    """The training step on mini-batches as the run makes them."""
    schedule = dataclasses.replace(schedule_of(case.config), epochs=1)
    which = case.corpus.examples_of(next(visits(case.corpus, schedule)).which)
    batch = packed_batch(case.corpus, which, run_shape(case.corpus, schedule, mesh), mesh)
    start = 0 if mode == "off" else case.layer
    number = shaped((), np.float32, replicated(mesh))
    hyper = step.Hyper(number, number, number, None if case.config.norm_constraint is None else number)
    inputs, params = inputs_of(case, mesh, start, mode, batch), Params(case.spec, weights)
    more = step.Regularizers(sides(case, mesh), retain_batch(case, mesh, start, mode))
    trace = lambda: step.train_step.trace(hyper, state, params, inputs, batch, more)  # noqa: E731
    beside = unread(weights, "embed") if start else 0
    return Program("train step", trace, chip_bytes(weights), chip_bytes(state), beside)


def cache_program(case: Case, mesh: Mesh, weights: Weights, beside: int) -> Program:
    """The pass that fills the activation cache; the tuned state is there already."""
    most, data = activation_cache.ROWS, mesh.shape["data"]
    length, rows = packing.even_rows(case.corpus, case.config.row_length, most, data)
    grid = shaped((rows, length), np.int32, sharding.rows_sharding(mesh, rows))
    params = Params(case.spec, weights)
    trace = lambda: activation_cache.cache_pass.trace(case.layer, params, grid, Rows(grid, grid))  # noqa: E731
    return Program("cache pass", trace, chip_bytes(weights), 0, beside + unread(weights, "norm", "head"))


def evaluation_programs(case: Case, mesh: Mesh, weights: Weights, state: EditState) -> list[Program]:
    """The teacher-forced pass over the edited prompts, and one decoding step with every slot filled."""
    spec, everywhere = case.spec, replicated(mesh)
    edits: Any = {n: shaped(a.shape, case.dtype, a.sharding) for n, a in state.theta.items()}
    params = Params(spec, weights, edits)
    _, first = next(packed(case.corpus, np.arange(len(case.corpus)), case.config.row_length, mesh))
    batch, ids = placed(first, mesh), shaped((case.tokens,), np.int32, everywhere)
    length = packing.few_sizes(int(case.corpus.lengths.max()), 32, 1)
    slots = decode.abstract_slots(params, mesh, packing.few_sizes(decode.MOST, 16, 4), length, NEW_TOKENS - 1)
    stop, enough = shaped((spec.vocab_size,), np.bool_, everywhere), shaped((), np.int32, everywhere)
    read = lambda: decode.read_batch.trace(case.layer, params, ids, batch)  # noqa: E731
    make = lambda: decode.decode.trace(params, slots, stop, enough)  # noqa: E731
    held = chip_bytes(weights), chip_bytes(edits)
    return [
        Program("evaluation pass", read, *held, chip_bytes((slots.keys, slots.values))),
        Program("decoding step", make, *held),
    ]

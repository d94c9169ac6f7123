"""The loop: the same edit by every path, one compilation, nothing moved implicitly, errors named."""

import functools
import threading
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.data.packing import Shape, corpus_from_lists, pack
from locft_jax.editing import trainer
from locft_jax.editing.hooks import Hook, StepRecord
from locft_jax.editing.site import find_site, read_site
from locft_jax.editing.step import Hyper, init_state, train_step
from locft_jax.editing.trainer import Job, NonFiniteLoss, Outcome, Schedule, ahead, run_shape, train
from locft_jax.model.activation_cache import cached_source
from locft_jax.model.sharding import make_mesh, place_batch, tensor_sharding
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params, abstract_weights, locate_tensor, weight_table

SPEC = parse_spec(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
)
RNG = np.random.default_rng(0)
PARTS = [RNG.integers(0, 64, RNG.integers(6, 15)) for _ in range(23)]
CORPUS = corpus_from_lists(PARTS, [len(p) - RNG.integers(1, 5) for p in PARTS])
ONE = (1, 1)  # data x model
MODES = {ONE: "device", (1, 8): "device", (2, 4): "host", (8, 1): "device"}  # of each mesh
# The MLP: one matrix splits over its first axis, one over its last. In 2 x 4 and 8 x 1 rows split too.
SITE = find_site(SPEC, ["layers.{}.mlp"], [1])
SCHEDULE = Schedule(8, 3, 0, "example", 32, Hyper(1e-2, 0.0, 1e-2))


@functools.cache
def base_weights():
    """Random weights ten times as large as initial ones: every layer matters."""
    rng = np.random.default_rng(0)
    shapes = abstract_weights(SPEC, jnp.dtype("float32"))
    normal = lambda a: 0.2 * rng.standard_normal(a.shape, np.float32)  # noqa: E731
    return {k: np.ones(a.shape, np.float32) if "norm" in k else normal(a) for k, a in shapes.items()}


@functools.cache
def placed(mesh_shape):
    """(mesh, weights on it)."""
    count = mesh_shape[0] * mesh_shape[1]
    mesh = make_mesh({"data": mesh_shape[0], "model": mesh_shape[1]}, jax.devices()[:count])
    table = weight_table(SPEC)
    return mesh, {
        k: jax.device_put(a, tensor_sharding(mesh, SPEC, table[k])) for k, a in base_weights().items()
    }


@dataclass(frozen=True)
class Run:
    records: list[StepRecord]
    outcome: Outcome
    theta: dict[str, np.ndarray]
    compilations: int
    mode: str


def begin(mode, schedule, mesh_shape, weights=None, shape=None, corpus=CORPUS, overrides=None):
    """(job, state before the first step)"""
    mesh, own = placed(mesh_shape)
    params = Params(SPEC, weights or own, overrides or {})
    source = cached_source(params, CORPUS, 1, mode, mesh, schedule.row_length)
    job = Job(params, mesh, corpus, source, schedule, shape=shape)
    return job, init_state(read_site(params, SITE, mesh, params.overrides))


class Seen(Hook):
    """Keeps every record as it came."""

    def __init__(self):
        self.records = []

    def on_step(self, record):
        self.records.append(record)


def edit(*args, **changes):
    before, seen = train_step._cache_size(), Seen()
    job, state = begin(*args, **changes)
    out = train(job, state, hooks=[seen])
    theta = {name: np.asarray(a) for name, a in out.state.theta.items()}
    return Run(seen.records, out, theta, train_step._cache_size() - before, job.source.mode)


@functools.cache
def run(mode, row_length, mesh_shape):
    """One edit by one path; every path is taken, and compiled, once."""
    if mode == "disk":
        run("host", row_length, mesh_shape)  # the same shapes: the file's run compiles nothing
    schedule = Schedule(8, 3, 0, "example", row_length, SCHEDULE.hyper)
    return edit(mode, schedule, mesh_shape)


PLAIN = ("device", 32, ONE)
PATHS = [("off", 32, ONE), ("host", 32, ONE), ("disk", 32, ONE), ("device", 128, ONE)]
PATHS += [(mode, 32, shape) for shape, mode in MODES.items() if shape != ONE]


@pytest.mark.parametrize(("mode", "row_length", "mesh_shape"), PATHS)
def test_every_path_is_the_same_edit(mode, row_length, mesh_shape):
    plain, other = run(*PLAIN), run(mode, row_length, mesh_shape)
    assert other.mode == mode
    losses = [r.loss for r in plain.records]
    assert len(losses) == 9 and losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose([r.loss for r in other.records], losses, rtol=1e-5)
    np.testing.assert_allclose(other.outcome.epoch_losses, plain.outcome.epoch_losses, rtol=1e-5)
    for name, value in plain.theta.items():
        row, layer = locate_tensor(SPEC, name)
        move = np.linalg.norm(value - base_weights()[row.key][layer])
        assert np.linalg.norm(other.theta[name] - value) < 1e-4 * move


@pytest.mark.parametrize("mesh_shape", MODES)
def test_tuned_tensors_and_moments_lie_where_the_table_puts_them(mesh_shape):
    mesh, _ = placed(mesh_shape)
    for state in (
        begin("off", SCHEDULE, mesh_shape)[1],
        run(MODES[mesh_shape], 32, mesh_shape).outcome.state,
    ):
        found = jax.tree_util.tree_leaves_with_path(state)
        moments = [path for path, leaf in found if leaf.ndim]
        assert len(moments) == 3 * len(SITE)  # masters, first and second moments
        for path, leaf in found:
            if leaf.ndim:
                row, _ = locate_tensor(SPEC, path[-1].key)
                assert leaf.dtype == jnp.float32 and leaf.shape == row.shape
                assert leaf.sharding == tensor_sharding(mesh, SPEC, row, stacked=False)
                assert leaf.sharding.is_fully_replicated == (mesh_shape[1] == 1)
                shard = leaf.addressable_shards[0].data.size
                assert shard * mesh_shape[1] == leaf.size  # each device holds its share only


@pytest.mark.parametrize(("mode", "row_length", "mesh_shape"), [PLAIN, *PATHS])
def test_a_run_compiles_its_step_once(mode, row_length, mesh_shape):
    assert run(mode, row_length, mesh_shape).compilations == (0 if mode == "disk" else 1)


def test_records_count_useful_tokens_and_epochs():
    done = run(*PLAIN)
    sizes, total = [8, 8, 7], int(CORPUS.lengths.sum())
    assert [r.examples for r in done.records] == sizes * 3
    assert [r.epoch for r in done.records] == [0] * 3 + [1] * 3 + [2] * 3
    assert [r.step for r in done.records] == list(range(1, 10))
    for epoch in range(3):
        own = [r for r in done.records if r.epoch == epoch]
        assert sum(r.tokens for r in own) == total
        mean = sum(r.loss * r.examples for r in own) / 23
        assert done.outcome.epoch_losses[epoch] == pytest.approx(mean, rel=1e-6)
    assert done.outcome.records == done.records
    assert done.outcome.stopped == "epochs"


def test_the_same_seed_gives_the_same_bytes_and_another_order_another_result():
    again = edit("device", SCHEDULE, ONE)
    assert [r.loss for r in again.records] == [r.loss for r in run(*PLAIN).records]
    assert all(np.array_equal(again.theta[n], a) for n, a in run(*PLAIN).theta.items())
    assert again.compilations == 0
    shape = run_shape(CORPUS, SCHEDULE, placed(ONE)[0])  # another order may need another one
    other = edit("device", Schedule(8, 1, 1, "example", 32, SCHEDULE.hyper), ONE, shape=shape)
    assert other.records[0].loss != again.records[0].loss


def test_a_larger_shape_changes_nothing():
    shape = run_shape(CORPUS, SCHEDULE, placed(ONE)[0])
    larger = Shape(shape.rows + 3, shape.length, shape.targets + 16, shape.row_targets)
    done = edit("device", SCHEDULE, ONE, shape=larger)
    np.testing.assert_allclose(
        [r.loss for r in done.records], [r.loss for r in run(*PLAIN).records], rtol=1e-5
    )


def test_an_edit_of_an_edited_model_is_an_edit_of_weights_that_hold_those_edits():
    _, weights = placed(ONE)
    # Below the site (in what is cached), the site itself, and above it.
    names = [f"model.layers.{l}.mlp.down_proj.weight" for l in range(3)]
    base = {name: 0.5 * weights["down"][l] for l, name in enumerate(names)}
    carried = edit("device", SCHEDULE, ONE, overrides=base)
    written = edit("device", SCHEDULE, ONE, weights | {"down": 0.5 * weights["down"]})
    losses = [r.loss for r in written.records]
    np.testing.assert_allclose([r.loss for r in carried.records], losses, rtol=1e-5)
    assert abs(losses[0] / run(*PLAIN).records[0].loss - 1) > 1e-2  # the edits matter
    for name, value in written.theta.items():
        np.testing.assert_allclose(carried.theta[name], value, atol=1e-5)


def test_early_stop_after_the_first_epoch_below_the_floor():
    hyper = Hyper(0.0, 0.0, 1e3)  # every loss is below it: nothing moves
    done = edit("device", Schedule(8, 3, 0, "example", 32, hyper), ONE)
    assert (done.outcome.stopped, len(done.records), len(done.outcome.epoch_losses)) == ("loss_floor", 3, 1)
    assert all(r.skipped for r in done.records)


# ------------------------------------------------------------------------------------ depth-first

# A floor that the mini-batches reach after different numbers of steps, the last one within the limit.
DEPTH = Schedule(8, 20, 0, "example", 32, Hyper(3e-2, 0.0, 0.5), "depth")


@functools.cache
def deep(mesh_shape=ONE):
    return edit("device", DEPTH, mesh_shape)


def test_an_epoch_ends_the_run_by_its_mean_and_not_by_its_last_batch(monkeypatch):
    """Losses by batch of 8, 8 and 7 edits: the last one of the first epoch alone is below the floor."""
    losses = iter([1.0, 1.0, 0.001, 0.001, 0.02, 0.001])
    monkeypatch.setattr(trainer, "train_step", lambda hyper, state, *rest: (state, jnp.float32(next(losses))))
    job, state = begin("device", SCHEDULE, ONE)
    out = train(job, state)
    assert (len(out.records), out.stopped) == (6, "loss_floor")
    assert out.epoch_losses == pytest.approx([(8 + 8 + 0.007) / 23, (0.008 + 0.16 + 0.007) / 23])


def test_depth_first_ends_each_mini_batch_in_turn():
    done = deep()
    own = [[r for r in done.records if r.epoch == i] for i in range(3)]
    assert [r for part in own for r in part] == done.records  # one pass
    assert [part[0].examples for part in own] == [8, 8, 7]
    assert [part[0].tokens for part in own] == [
        int(CORPUS.lengths[i : i + 8].sum()) for i in (0, 8, 16)
    ]  # in the order of the data
    for part in own:
        assert not any(r.skipped for r in part[:-1]) and (part[-1].skipped or len(part) == 20)
    assert len({len(part) for part in own}) > 1 and own[0][-1].skipped
    assert [r.step for r in done.records] == list(range(1, len(done.records) + 1))
    assert done.outcome.epoch_losses == [part[-1].loss for part in own]
    assert done.outcome.stopped == ("loss_floor" if all(p[-1].skipped for p in own) else "epochs")
    assert done.compilations == 1


def test_depth_first_on_eight_devices():
    other = deep((2, 4))
    assert other.compilations <= 1  # 0 where another run of this shape has compiled it
    np.testing.assert_allclose(
        [r.loss for r in other.records], [r.loss for r in deep().records], rtol=1e-4
    )  # 1e-4: up to 20 steps at a rate six times that of the other tests
    for name, value in deep().theta.items():
        row, layer = locate_tensor(SPEC, name)
        move = np.linalg.norm(value - base_weights()[row.key][layer])
        assert np.linalg.norm(other.theta[name] - value) < 1e-3 * move


class Kept(Hook):
    """Keeps every state (on the host: the next step consumes it)."""

    def __init__(self):
        self.states = {}

    def due(self, step, rounds):
        return True

    def on_state(self, state, records):
        self.states[len(records)] = jax.tree.map(np.asarray, state), list(records)


@pytest.mark.parametrize("schedule", [SCHEDULE, DEPTH], ids=["breadth", "depth"])
def test_a_run_resumes_after_any_step_bit_for_bit(schedule):
    job, fresh = begin("device", schedule, ONE)
    like, kept = jax.tree.map(lambda a: a.sharding, fresh), Kept()
    whole = train(job, fresh, hooks=[kept])
    known = run(*PLAIN) if schedule is SCHEDULE else deep()
    assert whole.records == known.records and len(kept.states) == len(whole.records)
    last = len(whole.records)
    ends = [r.step for r in whole.records if r.skipped]  # nothing of the mini-batch is left to do
    for step in {1, ends[0] - 1, ends[0], ends[0] + 1, last} if ends else {1, 3, 5, last}:
        state, records = kept.states[step]
        out = train(job, jax.tree.map(jax.device_put, state, like), records)
        assert (out.records, out.epoch_losses) == (whole.records, whole.epoch_losses)
        for name, value in known.theta.items():
            assert np.array_equal(out.state.theta[name], value)


# ---------------------------------------------------------------------------------------- errors


def test_nan_in_the_weights_names_the_first_step():
    threads = threading.active_count()
    mesh, weights = placed(ONE)
    bad = weights | {"norm": weights["norm"].at[0].set(jnp.nan)}
    with pytest.raises(NonFiniteLoss, match="nan in epoch 1, step 1"):
        edit("device", SCHEDULE, ONE, bad)
    assert threading.active_count() == threads


def test_a_diverging_run_names_its_epoch_and_step():
    mesh, _ = placed(ONE)
    shape = run_shape(CORPUS, SCHEDULE, mesh)
    # One infinite step: the loss after it is NaN, in step 2 of the first epoch...
    wild = Hyper(float("inf"), 0.0, 1e-2)
    with pytest.raises(NonFiniteLoss, match="epoch 1, step 2"):
        edit("device", Schedule(8, 3, 0, "example", 32, wild), ONE, shape=shape)
    # ... or in epoch 2, where an epoch is one batch.
    few = CORPUS.take(np.arange(7))
    with pytest.raises(NonFiniteLoss, match="epoch 2, step 2"):
        edit("device", Schedule(8, 3, 0, "example", 32, wild), ONE, shape=shape, corpus=few)


def test_a_batch_that_cannot_be_made_is_an_error_of_the_run():
    threads = threading.active_count()
    with pytest.raises(AssertionError, match="run_shape"):
        edit("device", SCHEDULE, ONE, shape=Shape(1, 32, 16, 8))
    assert threading.active_count() == threads


# ------------------------------------------------------------------------------- what moves, and when


@pytest.mark.parametrize(("mode", "mesh_shape"), [("device", ONE), ("host", (2, 4))])
def test_the_loop_moves_nothing_implicitly(mode, mesh_shape):
    """All threads are guarded. Batches and results move by `device_put` and `device_get`; a number or
    a numpy array handed to the compiled step would be an implicit transfer."""
    run(mode, 32, mesh_shape)  # compiled: tracing makes constants
    job, state = begin(mode, SCHEDULE, mesh_shape)
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        with pytest.raises(Exception, match="[Dd]isallowed"):
            jnp.sin(np.ones(3))  # the guard is on
        out = train(job, state)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert len(out.records) == 9


def test_rows_of_a_batch_split_over_data_and_lists_are_everywhere():
    mesh, _ = placed((2, 4))
    shape = run_shape(CORPUS, SCHEDULE, mesh)
    assert shape.rows % 2 == 0
    batch = place_batch(pack(CORPUS, np.arange(8), shape), mesh)
    for leaf in jax.tree.leaves(batch):
        share = 2 if leaf.ndim == 2 else 1
        assert leaf.addressable_shards[0].data.shape[0] * share == leaf.shape[0]


def test_ahead_keeps_the_order_and_stays_few_items_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    for i, got in enumerate(ahead(items(), depth=2)):
        assert got == i
        assert len(made) <= i + 1 + 2 + 1  # read, waiting, and the one in hand
    assert i == 19


def test_ahead_works_while_the_reader_does():
    started = threading.Event()

    def items():
        yield 0
        started.set()
        yield 1

    with_reader = ahead(items())
    assert next(with_reader) == 0
    assert started.wait(5)  # made before it was asked for
    assert list(with_reader) == [1]


def test_ahead_hands_over_what_went_wrong():
    threads = threading.active_count()

    def items():
        yield 1
        raise KeyError("lost")

    reader = ahead(items())
    assert next(reader) == 1
    with pytest.raises(KeyError, match="lost"):
        next(reader)
    assert threading.active_count() == threads


def test_ahead_stops_its_thread_when_nobody_reads_on():
    threads, made = threading.active_count(), []
    reader = ahead(made.append(i) or i for i in range(10**9))
    assert next(reader) == 0
    begin = time.monotonic()
    reader.close()
    assert time.monotonic() - begin < 2
    assert threading.active_count() == threads and len(made) < 10

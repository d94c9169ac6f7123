"""Hooks: when the loop calls them, also where it fails; progress, metrics, evaluation, a profile."""

import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.data.packing import corpus_from_lists
from locft_jax.editing import trainer
from locft_jax.editing.hooks import Evaluate, Hook, Metrics, Profile, Progress, StepRecord
from locft_jax.editing.step import EditState, Hyper, init_state
from locft_jax.editing.trainer import Job, NonFiniteLoss, Schedule, train
from locft_jax.model.activation_cache import token_source
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params

SPEC = parse_spec(
    {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
)
CORPUS = corpus_from_lists([[1, 2, 3], [4, 5], [6, 7, 8]], [1, 1, 2])  # mini-batches of 2 and 1 edits
RECORD = StepRecord(epoch=0, step=1, loss=0.5, skipped=False, examples=2, tokens=10)


@pytest.fixture
def run(monkeypatch):
    """`run(hooks, losses, ...)`: a loop whose steps have these losses; each adds 1 to the state."""

    def start(hooks, losses, epochs=2, pipeline="breadth", done=()):
        left = iter(losses)

        def step(hyper, state, *rest):
            return EditState(jax.tree.map(lambda a: a + 1, state.theta), state.optimizer), jnp.float32(
                next(left)
            )

        monkeypatch.setattr(trainer, "train_step", step)
        mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
        schedule = Schedule(2, epochs, 0, "example", 16, Hyper(1e-2, 0.0, 0.1), pipeline)
        job = Job(Params(SPEC, {}), mesh, CORPUS, token_source(CORPUS, mesh), schedule)
        return train(job, init_state({"w": jnp.full((2, 2), float(len(done)))}), done, hooks)

    return start


class Log(Hook):
    """Writes down its calls; `at`: the steps whose state it asks for; `fails`: the call that raises."""

    def __init__(self, calls, name="", at=(), fails=None):
        self.calls, self.name, self.at, self.fails = calls, name, at, fails

    def call(self, what, *more):
        self.calls.append(" ".join(map(str, [self.name + what, *more])))
        if what == self.fails:
            raise KeyError(what)

    def on_start(self, done):
        self.call("start", len(done))

    def on_step(self, record):
        self.call("step", record.step)

    def due(self, step, rounds):
        self.call("due", step, rounds)
        return step in self.at

    def on_state(self, state, records):
        assert (
            np.asarray(state.theta["w"]).tolist() == [[len(records)] * 2] * 2
        )  # the state after them, no other
        self.call("state", len(records))

    def on_end(self):
        self.call("end")


def test_steps_are_read_one_behind_the_device_and_states_when_they_are_asked_for(run):
    calls = []
    out = run([Log(calls, at=(3,))], [1.0] * 4)
    assert calls == [
        "start 0", "due 1 None", "step 1", "due 2 1", "step 2", "due 3 None", "step 3", "state 3", "due 4 2",
        "step 4", "end",
    ]  # fmt: skip
    assert [r.step for r in out.records] == [1, 2, 3, 4]


def test_depth_first_every_step_is_read_and_rounds_are_mini_batches(run):
    calls = []
    run([Log(calls, at=(3,))], [1.0, 0.01, 1.0, 1.0], pipeline="depth")
    assert calls == [
        "start 0", "step 1", "due 1 None", "step 2", "due 2 1", "step 3", "due 3 None", "state 3", "step 4",
        "due 4 2", "end",
    ]  # fmt: skip


def test_several_hooks_are_called_in_their_order_and_end_in_reverse(run):
    calls = []
    run([Log(calls, "a:", at=(2,)), Log(calls, "b:", at=(2,))], [1.0, 1.0], epochs=1)
    assert calls == [
        "a:start 0", "b:start 0", "a:due 1 None", "b:due 1 None", "a:step 1", "b:step 1", "a:due 2 1",
        "b:due 2 1", "a:step 2", "b:step 2", "a:state 2", "b:state 2", "b:end", "a:end",
    ]  # fmt: skip


def test_a_run_that_resumes_tells_what_was_done(run):
    calls = []
    done = [StepRecord(0, 1, 1.0, False, 2, 5), StepRecord(0, 2, 1.0, False, 1, 3)]
    run([Log(calls, at=(3,))], [1.0, 1.0], done=done)
    assert calls == ["start 2", "due 3 None", "step 3", "state 3", "due 4 2", "step 4", "end"]


def test_an_early_stop_is_an_end(run):
    calls = []
    assert run([Log(calls)], [0.01, 0.02], epochs=5).stopped == "loss_floor"
    assert calls[-2:] == ["step 2", "end"]


@pytest.mark.parametrize("fails", ["start", "step", "due", "state", "end"])
def test_hooks_end_where_one_of_them_fails(run, fails):
    calls, threads = [], threading.active_count()
    hooks = [Log(calls, "a:"), Log(calls, "b:", at=(1,), fails=fails), Log(calls, "c:")]
    with pytest.raises(KeyError, match=fails):
        run(hooks, [1.0] * 4)
    ends = [c for c in calls if c.endswith("end")]
    assert ends == (
        ["b:end", "a:end"] if fails == "start" else ["c:end", "b:end", "a:end"]
    )  # c has not begun
    assert calls[-len(ends) :] == ends and threading.active_count() == threads


def test_hooks_end_where_a_loss_is_not_finite(run):
    calls = []
    with pytest.raises(NonFiniteLoss, match="nan in epoch 1, step 2"):
        run([Log(calls)], [1.0, float("nan"), 1.0, 1.0])
    assert calls[-1] == "end" and "step 1" in calls and "step 2" not in calls


def test_a_hook_need_not_override_anything(run):
    assert len(run([Hook()], [1.0] * 4).records) == 4


# ---------------------------------------------------------------- those that are there


def test_evaluate_looks_at_what_would_be_exported_after_every_other_epoch(run):
    seen = []
    export = lambda state: np.asarray(state.theta["w"])[0, 0]  # noqa: E731
    run(
        [Evaluate(2, export, lambda tensors, records: seen.append((tensors, len(records))))],
        [1.0] * 10,
        epochs=5,
    )
    assert seen == [(4.0, 4), (8.0, 8)]


def test_progress_shows_steps_loss_and_edits_per_second():
    class Bar:
        skipped, shown = 0, []

        def skip(self, count):
            self.skipped = count

        def rate(self):
            return 2.0

        def advance(self, count, note):
            self.shown.append((count, note))

    bar = Bar()
    hook = Progress(bar, edits_per_step=50, round_name="epoch")
    hook.on_start([RECORD, RECORD])
    hook.on_step(RECORD)
    assert bar.skipped == 2 and bar.shown == [(1, "epoch 1, loss 0.5000, 100 edits/s")]


def events(folder):
    """The scalars of an events file: {tag: [(step, value)]}."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):  # length, its checksum, an event, its checksum
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_metrics_of_every_step_can_be_read_as_tensorboards(run, tmp_path):
    run([Metrics("tensorboard", tmp_path / "logs")], [3.0, 2.0, 1.0, 0.05])
    found = events(tmp_path / "logs")
    assert found.keys() == {f"edit/{name}" for name in ("loss", "epoch", "skipped", "tokens_per_second")}
    assert found["edit/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, pytest.approx(0.05))]
    assert found["edit/epoch"] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert found["edit/skipped"] == [(1, 0), (2, 0), (3, 0), (4, 1)]
    assert all(value > 0 for _, value in found["edit/tokens_per_second"])


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_profile_is_a_trace_of_some_steps(run, tmp_path, monkeypatch, steps):
    """Of those after the first one; also where a run ends before the profile does, or before it begins."""
    begun, ended = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    folder = tmp_path / "trace"
    hook = Profile(str(folder), after=2, steps=3)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: (begun.append(log.records), start(path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (ended.append(log.records), stop()))

    class Count(Hook):
        records = 0

        def on_step(self, record):
            self.records += 1

    log = Count()
    run([log, hook], [1.0] * steps, epochs=-(-steps // 2)) if steps > 1 else hook.on_end()
    assert (begun, ended) == {1: ([], []), 2: ([2], [2]), 20: ([2], [5])}[steps]
    assert bool(list(folder.rglob("*.xplane.pb"))) == (steps > 1)

"""Runs that are killed, stopped, out of disk or damaged, and what --resume makes of them.

The reference is always the same run left alone: what is not disturbed and what is resumed must be
equal byte for byte.
"""

import json
import os
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from forked import Forked, edit_until, stopping_at

from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.editing import checkpointer, trainer
from locft_jax.editing.hooks import Progress

# Long enough that a kill falls anywhere; the floor is out of reach, so that all steps are made.
LONG = {"num_steps": 12, "loss_floor": 0, "checkpoint_every": 1}
SHORT = {**LONG, "num_steps": 2, "evaluate": "false", "export": "delta"}
SAME = ("delta.safetensors", "steps.jsonl", "predictions.jsonl", "edits.jsonl")


def result(out: Path) -> dict[str, bytes]:
    """The bytes that must not depend on what happened on the way."""
    files = [out / name for name in SAME if (out / name).exists()]
    files += [p for p in (out / "hf").rglob("*") if p.is_file()]
    found = {str(p.relative_to(out)): p.read_bytes() for p in files}
    report = json.loads((out / "report.json").read_text())
    exact = ("before", "after", "epoch_losses", "batches", "fingerprint", "stopped", "steps_run")
    return {**found, "report": json.dumps([report[k] for k in exact]).encode()}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


def saved(out: Path) -> int:
    """The last step that a run in `out` has kept, 0 for none."""
    return max((int(name) for name in names(out / "checkpoint" / "steps") if name.isdecimal()), default=0)


def said(capsys) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def undisturbed(edit_arguments, tmp_path_factory):
    """`undisturbed(settings)` -> the bytes of a run that was left alone."""
    known = {}

    def run(settings):
        key = json.dumps(settings)
        if key not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            assert run_command(edit, edit_arguments(out, **settings)) == 0
            known[key] = result(out)
        return known[key]

    return run


@contextmanager
def signal_at(monkeypatch, step: int):
    """SIGTERM to this process when the loss of that step is known."""
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step", stopping_at(step))
        yield


# ---------------------------------------------------------------- kill -9, SIGTERM


# Which of the changes to files a run is killed at, as shares of all: from its first file to its last, at once
# or some seconds later, when another thread may be writing.
KILLS = [(0.0, 0), (0.1, 0.01), (0.3, 0), (0.45, 0.005), (0.6, 0), (0.7, 0.02), (0.85, 0), (0.95, 0)]


def test_killed_and_resumed(edit_arguments, tmp_path):
    """kill -9 wherever it falls: before the first step, in a checkpoint's write, in the evaluation, in the
    export. Every chain of killed and resumed runs ends as the run that was left alone."""
    run = lambda *arguments: Forked(tmp_path / "work", edit_until, *arguments)  # noqa: E731
    settings = {**LONG, "num_steps": 4}
    whole = run(edit_arguments(tmp_path / "whole", **settings), str(tmp_path / "whole"), 0, 0)
    assert whole.wait() == 0, whole.said()
    expected, changes = result(tmp_path / "whole"), int(whole.said()[0].split()[-2])
    assert changes > 100

    out, found = tmp_path / "out", []
    arguments = [*edit_arguments(out, **settings), "--resume"]
    for share, after in KILLS:
        killed = run(arguments, str(out), 1 + int(share * changes), after)
        status = killed.wait()
        if status == 0:  # what was left to do made fewer changes
            assert result(out) == expected
            shutil.rmtree(out)
            killed = run(arguments, str(out), 1 + int(share * changes), after)
            status = killed.wait()
        assert status == -signal.SIGKILL, killed.said()
        assert names(out) <= {"checkpoint"} or result(out) == expected  # whole or not at all
        found.append(saved(out))
    last = run(arguments, str(out), 0, 0)
    assert last.wait() == 0, last.said()
    assert result(out) == expected and "checkpoint" not in names(out)
    assert sorted(names(tmp_path)) == ["out", "whole", "work"]  # no leftovers beside them
    assert len(set(found)) > 3, found  # kills at different steps


def test_a_program_that_is_told_to_stop_says_how_to_go_on(edit_arguments, tmp_path):
    arguments = edit_arguments(tmp_path / "out", **{**LONG, "num_steps": 4000, "checkpoint_every": "10m"})
    process = Forked(tmp_path / "work", edit_until, arguments, "", 0, 0)
    while not (tmp_path / "out" / "checkpoint" / "before.json").exists():
        assert process.status() is None, process.said()
        time.sleep(0.05)
    time.sleep(1)  # into the loop, most likely; anywhere is right
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 1
    errors = process.said()[1]
    assert "Traceback" not in errors, errors
    assert "interrupted: " in errors and "the same command with --resume resumes from there" in errors
    assert names(tmp_path / "out") == {"checkpoint"}


@pytest.mark.parametrize("step", [1, 17, 36])
def test_stopped_at_a_step_and_resumed(edit_arguments, tmp_path, undisturbed, monkeypatch, capsys, step):
    """SIGTERM, as when a TPU is preempted, at the first step, in between, and at the last."""
    settings = {**LONG, "checkpoint_every": "10m"}
    expected = undisturbed(settings)
    arguments = edit_arguments(tmp_path / "out", **settings)
    with signal_at(monkeypatch, step):
        assert run_command(edit, arguments) == 1
    message = said(capsys)
    saved = step + 1 if step < 36 else 36  # the step after was on the device already
    assert f"interrupted: the run up to step {saved}" in message and "--resume" in message
    assert names(tmp_path / "out") == {"checkpoint"}
    assert run_command(edit, [*arguments, "--resume"]) == 0
    assert result(tmp_path / "out") == expected and "checkpoint" not in names(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["resumed"] == [saved]


@pytest.mark.parametrize("step", [2, 5])
def test_a_depth_first_run_is_resumed(edit_arguments, tmp_path, undisturbed, monkeypatch, step):
    """In a mini-batch, and beyond its end, which the losses decide."""
    settings = {**SHORT, "pipeline": "depth", "num_steps": 6, "loss_floor": 1.5, "method": "ft-l"}
    arguments = edit_arguments(tmp_path / "out", **settings)
    with signal_at(monkeypatch, step):
        assert run_command(edit, arguments) == 1
    assert run_command(edit, [*arguments, "--resume"]) == 0
    assert result(tmp_path / "out") == undisturbed(settings)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["resumed"] == [step]


def test_resumed_on_a_mesh(edit_arguments, tmp_path, undisturbed, monkeypatch):
    settings = {**SHORT, "mesh": "{data: 2, model: 4}"}
    arguments = edit_arguments(tmp_path / "out", **settings)
    with signal_at(monkeypatch, 3):
        assert run_command(edit, arguments) == 1
    assert run_command(edit, [*arguments, "--resume"]) == 0
    assert result(tmp_path / "out") == undisturbed(settings)


# ---------------------------------------------------------------- who may go on


@pytest.fixture
def stopped(edit_arguments, tmp_path, monkeypatch, capsys):
    """The folder of a run that was stopped at its second step."""
    with signal_at(monkeypatch, 2):
        assert run_command(edit, edit_arguments(tmp_path / "out", **SHORT)) == 1
    capsys.readouterr()
    return tmp_path / "out"


def test_another_run_does_not_go_on(
    stopped, edit_arguments, edits_file, tiny_model_dir, make_variant, make_model, tmp_path, capsys
):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(edits_file.read_text())[1:]))
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    make_model(model, seed=1)
    half = make_variant(tiny_model_dir, tmp_path / "half", "bfloat16", files=1)
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    for changes, keys in [
        ({"lr": 2e-2, "batch_size": 4}, ("learning_rate: 0.01 there, 0.02", "batch_size: 5 there, 4 here")),
        ({"seed": 1}, ("seed: 0 there, 1 here",)),
        ({"data_path": other}, ("data_sha256",)),
        ({"model_name_or_path": model}, ("base_model",)),
        ({"model_name_or_path": half}, ("base_model",)),
        ({"mesh": "{data: 2, model: 1}"}, ("mesh: {",)),
        ({"layer": 1}, ("layer: 2 there, 1 here", "site")),
    ]:
        arguments = [*edit_arguments(stopped, **{**SHORT, **changes}), "--resume"]
        assert run_command(edit, arguments) == 2
        message = said(capsys)
        assert message.startswith("error: --resume: ") and "is of another run" in message
        assert all(key in message for key in keys), message
        assert len(message.splitlines()) < 25
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before


def test_keys_that_change_no_result_may_differ(stopped, edit_arguments, undisturbed):
    changes = {**SHORT, "checkpoint_every": "5m", "export": "[delta, hf]", "memory_budget": 1}
    assert run_command(edit, [*edit_arguments(stopped, **changes), "--resume"]) == 0
    expected = undisturbed(SHORT)
    assert {k: v for k, v in result(stopped).items() if not k.startswith("hf/")} == expected


def test_an_interrupted_run_is_not_overwritten_by_mistake(
    stopped, edit_arguments, undisturbed, capsys, tmp_path
):
    arguments = edit_arguments(stopped, **SHORT)
    assert run_command(edit, arguments) == 2
    message = said(capsys)
    assert (
        "holds a run that was interrupted" in message and "--resume" in message and "--overwrite" in message
    )
    assert run_command(edit, [*arguments, "--overwrite"]) == 0  # anew
    assert json.loads((stopped / "report.json").read_text())["resumed"] == []
    assert result(stopped) == undisturbed(SHORT)


def test_a_finished_run_has_nothing_to_resume(edit_arguments, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*edit_arguments(out, **SHORT), "--resume"]
    assert run_command(edit, arguments) == 0
    assert "holds no interrupted run: beginning anew" in said(capsys)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    assert run_command(edit, arguments) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()} == before
    assert run_command(edit, [*edit_arguments(out, **{**SHORT, "seed": 3}), "--resume"]) == 2
    assert "seed: 0 there, 3 here" in said(capsys)


def test_the_last_checkpoint_stays_for_whoever_asks(edit_arguments, tmp_path):
    import orbax.checkpoint as ocp

    out = tmp_path / "out"
    assert run_command(edit, [*edit_arguments(out, **SHORT), "--keep-checkpoint"]) == 0
    assert max(int(n) for n in names(out / "checkpoint") if n.isdecimal()) == 6
    with ocp.CheckpointManager(out / "checkpoint") as manager:
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(), progress=ocp.args.JsonRestore())
        found = manager.restore(6, args=wanted)
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert found.progress["records"] == steps
    assert all(bool(np.isfinite(a).all()) for a in jax.tree.leaves(found.state))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["truncated", "missing", "all", "run.json"])
def test_a_damaged_checkpoint_falls_back_to_an_older_one(
    stopped, edit_arguments, undisturbed, capsys, damage
):
    steps = sorted((p for p in (stopped / "checkpoint" / "steps").iterdir()), key=lambda p: int(p.name))
    assert len(steps) == checkpointer.KEPT
    if damage == "run.json":
        (stopped / "checkpoint" / "run.json").write_text('{"half')
    for step in steps if damage == "all" else steps[-1:]:
        for path in step.rglob("*"):
            if damage == "missing" and path.is_file():
                path.unlink()
            elif damage in ("truncated", "all") and path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run_command(edit, [*edit_arguments(stopped, **SHORT), "--resume"]) == 0
    message = said(capsys)
    if damage == "run.json":
        assert "holds no interrupted run: beginning anew" in message
    else:
        assert f"the checkpoint of step {steps[-1].name} cannot be read" in message
    assert result(stopped) == undisturbed(SHORT)
    report = json.loads((stopped / "report.json").read_text())
    assert report["resumed"] == ([] if damage in ("all", "run.json") else [int(steps[0].name)])


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(edit_arguments, tmp_path, monkeypatch, capsys):
    step = trainer.train_step
    calls = []

    def fails(*arguments):
        state, loss = step(*arguments)
        calls.append(1)
        return state, loss * np.nan if len(calls) == 5 else loss

    monkeypatch.setattr(trainer, "train_step", fails)
    assert run_command(edit, edit_arguments(tmp_path / "out", **SHORT)) == 1
    message = said(capsys)
    assert message.startswith("failed: the loss is nan in epoch 2, step 5, over the edits ")
    assert f"the state after step 4 is kept in {tmp_path / 'out' / 'checkpoint'}" in message
    assert saved(tmp_path / "out") == 4


def test_a_state_that_is_not_finite_is_not_kept(edit_arguments, tmp_path, capsys):
    assert run_command(edit, edit_arguments(tmp_path / "out", **{**SHORT, "lr": "1e39"})) == 1
    message = said(capsys)
    assert "the loss is " in message and "is kept" not in message
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- a full disk


@contextmanager
def files_of_at_most(size: int):
    """No file may grow beyond `size` bytes: writing fails as it does on a full disk. What is compiled is not
    stored meanwhile: half a file would spoil the cache that all tests share."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.mark.parametrize(("export", "size"), [("hf", 100_000), ("orbax", 20_000), ("delta", 10_000)])
def test_a_disk_that_is_full(edit_arguments, tmp_path, undisturbed, capfd, export, size):
    """In the export of one kind or another; with less room the checkpoints fail too."""
    settings = {**SHORT, "export": export}
    out = tmp_path / "out"
    with files_of_at_most(size):
        assert run_command(edit, edit_arguments(out, **settings)) == 1
    message = capfd.readouterr().err
    assert "failed: " in message and "too large" in message and "Traceback" not in message, message
    assert len(message.splitlines()) < 25
    if export != "hf":
        assert "no checkpoint at step" in message or "could not be written" in message
        assert names(tmp_path) == set()
    else:
        assert "the run up to step 6" in message and "--resume" in message
        assert names(tmp_path) == {"out"} and names(out) == {"checkpoint"}
    assert run_command(edit, [*edit_arguments(out, **settings), "--resume"]) == 0
    assert result(out) == undisturbed(settings)
    assert json.loads((out / "report.json").read_text())["resumed"] == ([6] if export == "hf" else [])

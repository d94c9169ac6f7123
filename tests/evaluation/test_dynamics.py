"""Learning dynamics: what is measured on the way changes nothing, and is kept over a resume."""

import json
import os
import signal

import numpy as np
import pytest

from locft_jax import UserError
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.config import Config
from locft_jax.editing import hooks

RATES = ("reliability", "generalization", "locality", "locality_agreement", "capability")
SHORT = {"num_steps": 6, "loss_floor": 0, "export": "[delta]"}  # batches of 5 among 12 edits: 3 an epoch


def run(arguments, out, *options, **changes):
    """(exit status, report) of the edit command."""
    status = run_command(edit, [*options, *arguments(out, **{**SHORT, **changes})])
    path = out / "report.json"
    return status, json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def breadth(edit_arguments, tmp_path_factory):
    """(folder, report) of a run that was looked at every second epoch."""
    out = tmp_path_factory.mktemp("dynamics") / "out"
    status, report = run(edit_arguments, out, eval_every=2)
    assert status == 0
    return out, report


def figures(line):
    return {key: line["figures"][key] for key in RATES}


def test_every_so_many_epochs_and_the_edit_is_the_same(breadth, edit_arguments, tmp_path):
    out, report = breadth
    lines = report["dynamics"]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (3, 12), (5, 18)]
    assert figures(lines[-1]) == {key: report["after"][key] for key in RATES}  # the edit ended there
    assert figures(lines[0]) != figures(lines[-1])
    for line in lines:
        sizes = [3, 3, 2, 2, 2]  # fifths of 12 edits, one probe each
        assert np.dot(line["shards"], sizes) == pytest.approx(12 * line["figures"]["reliability"])
    status, plain = run(edit_arguments, tmp_path / "plain")
    assert status == 0 and plain["dynamics"] == []
    assert plain["after"] == report["after"] and plain["epoch_losses"] == report["epoch_losses"]
    assert (tmp_path / "plain/steps.jsonl").read_bytes() == (out / "steps.jsonl").read_bytes()
    assert 0 < report["seconds"]["edit"] < 60 and report["tokens_per_second"] > 0


def test_depth_first_after_every_mini_batch(edit_arguments, tmp_path):
    status, report = run(edit_arguments, tmp_path / "out", eval_every=1, pipeline="depth", loss_floor=1.08)
    assert status == 0
    steps = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    last = {line["epoch"]: line["step"] for line in steps}
    assert [(line["epoch"], line["step"]) for line in report["dynamics"]] == list(last.items())
    assert len(last) == 3
    assert figures(report["dynamics"][-1]) == {key: report["after"][key] for key in RATES}


@pytest.mark.parametrize("step", [11, 12])  # before the second look, and when it is due
def test_a_resumed_run_keeps_what_was_measured(breadth, edit_arguments, tmp_path, monkeypatch, step):
    def kill(hook, record):
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(hooks.Evaluate, "on_step", kill)
        assert run(edit_arguments, out, eval_every=2) == (1, None)
    kept = json.loads((out / "checkpoint/dynamics.json").read_text())
    (out / "checkpoint/dynamics.json").write_text(
        json.dumps([*kept, {**kept[0], "step": 12, "figures": "of a step that was not saved"}])
        if len(kept) == 1
        else json.dumps(kept)
    )
    status, report = run(edit_arguments, out, "--resume", eval_every=2)
    assert status == 0 and report["resumed"]
    without = [{k: v for k, v in line.items() if k != "seconds"} for line in report["dynamics"]]
    assert without == [{k: v for k, v in line.items() if k != "seconds"} for line in breadth[1]["dynamics"]]


def test_it_needs_the_evaluation():
    with pytest.raises(UserError, match="`eval_every: 3` needs evaluate: true"):
        Config(eval_every=3, evaluate=False)

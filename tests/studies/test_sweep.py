"""The sweep command: a run is what a plain edit with its settings gives; a killed sweep goes on."""

import csv
import json

import pytest

from locft_jax.cli import sweep
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.studies.tables import RATES

GRID = "grid:\n  pipeline: [breadth, depth]\n  num_steps: [2, 4]\n"


@pytest.fixture(scope="module")
def arguments(edit_arguments, tmp_path_factory):
    """`arguments(out, grid, option, ..., key=value)`: a sweep over `grid` of the tiny model with EDITS."""

    def make(out, grid=GRID, *options, **changes):
        path = tmp_path_factory.mktemp("sweep") / "try.yaml"
        path.write_text(grid)
        given = edit_arguments(out, **changes)
        return [str(path), *options, *(a for a in given if not a.startswith("num_steps"))]

    return make


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """What a whole sweep wrote. Shared: do not write to it."""
    out = tmp_path_factory.mktemp("sweeps") / "run"
    assert run_command(sweep.main, arguments(out, eval_every=2)) == 0
    return out


def lines(out):
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    return [{k: v for k, v in r.items() if k not in ("seconds", "edit_seconds", "dynamics")} for r in runs]


def test_a_run_is_what_a_plain_edit_gives(run, edit_arguments, tmp_path):
    out = tmp_path / "edit"
    changes = {"pipeline": "depth", "num_steps": "4", "export": "[delta]"}
    assert run_command(edit, edit_arguments(out, **changes)) == 0
    report, line = json.loads((out / "report.json").read_text()), lines(run)[3]
    assert line["settings"] == {"pipeline": "depth", "num_epochs": 4}
    assert {key: line[key] for key in RATES} == {key: report["after"][key] for key in RATES}
    assert (line["steps"], line["before"]) == (report["steps_run"], report["before"])
    assert line["loss"] == report["epoch_losses"][-1]


def test_what_a_sweep_leaves(run):
    names = {"sweep.json", "sweep.csv", "sweep.png", "dynamics.png"}
    assert {p.name for p in run.iterdir()} == names
    with (run / "sweep.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["pipeline"], r["num_epochs"]) for r in rows] == [
        ("breadth", "2"), ("breadth", "4"), ("depth", "2"), ("depth", "4"),
    ]  # fmt: skip
    assert [float(r["locality"]) for r in rows] == [line["locality"] for line in lines(run)]


def test_a_sweep_that_is_killed_goes_on_and_may_grow(run, arguments, tmp_path, monkeypatch, capsys):
    out, edits = tmp_path / "out", []
    real = sweep.measure

    def stop_at_the_third(model, job):
        if len(edits) == 2:
            raise KeyboardInterrupt
        edits.append(job.run.name)
        return real(model, job)

    monkeypatch.setattr(sweep, "measure", stop_at_the_third)
    assert run_command(sweep.main, arguments(out, eval_every=2)) == 1
    assert "--resume" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {"checkpoint"}
    with (out / "checkpoint" / "runs.jsonl").open("a") as f:
        f.write('{"name": "half a li')
    assert run_command(sweep.main, arguments(out, eval_every=2)) == 2  # not silently begun anew

    monkeypatch.setattr(sweep, "measure", lambda model, job: edits.append(job.run.name) or real(model, job))
    more = GRID + "also:\n  - {pipeline: depth, num_steps: 1}\n"
    assert run_command(sweep.main, arguments(out, more, "--resume", eval_every=2)) == 0
    assert len(edits) == 5  # each once
    assert lines(out)[:4] == lines(run)
    assert run_command(sweep.main, arguments(out, more, "--resume", eval_every=2)) == 0
    assert len(edits) == 5 and "nothing to resume" in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused(arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    line = {"name": "pipeline=breadth, num_epochs=2", "run": "another"}
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "runs.jsonl").write_text(json.dumps(line) + "\n")
    assert run_command(sweep.main, arguments(out, GRID, "--resume")) == 2
    assert "with other settings, data or model" in capsys.readouterr().err
    line["name"] = "lr=1"
    (out / "checkpoint" / "runs.jsonl").write_text(json.dumps(line) + "\n")
    assert run_command(sweep.main, arguments(out, GRID, "--resume")) == 2
    assert "not in this sweep" in capsys.readouterr().err
    assert json.loads((out / "checkpoint" / "runs.jsonl").read_text()) == line


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("grid: {layer: [0, 9]}\n", "out of range"),
        ("grid: {rewrite_module: [layers.{}.nothing]}\n", "matches no tensor"),
        ("grid: {model_name_or_path: [no/where/else]}\n", "no folder"),
        ("grid: {preserve_data: [nothing.txt], preserve: [soft]}\n", "preserve_data"),
    ],
)
def test_every_run_is_looked_at_before_any_weight_is_loaded(
    grid, told, arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("locft_jax.prepare.load_opened", None)
    out = tmp_path / "out"
    grid = grid.replace("layers.{}.nothing", '"layers.{}.nothing"')
    assert run_command(sweep.main, arguments(out, grid)) == 2
    assert told in capsys.readouterr().err and not out.exists()


def test_results_do_not_go_to_a_url(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(sweep.main, arguments("gs://bucket/sweep")) == 2
    assert "gs://bucket/sweep is a URL" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_whose_loss_is_not_finite_is_a_line_that_says_so(arguments, tmp_path):
    out = tmp_path / "out"
    assert run_command(sweep.main, arguments(out, "grid: {lr: [1e-3, 1e38], num_steps: [3]}\n")) == 0
    fine, failed = lines(out)
    assert fine["reliability"] is not None
    assert failed["reliability"] is None and "loss is" in failed["stopped"]

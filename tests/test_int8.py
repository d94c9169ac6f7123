"""`weights: int8` through the commands: what is trained, measured, written, resumed."""

import json

import numpy as np
import pytest
from forked import stopping_at
from safetensors.numpy import load_file

from locft_jax import Config, edit, load_model
from locft_jax.cli import ask
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit_command
from locft_jax.cli.evaluate import main as evaluate_command
from locft_jax.data.requests import read_requests
from locft_jax.editing import run as run_module
from locft_jax.editing.hooks import Progress
from locft_jax.io.delta import BASE
from locft_jax.io.hf_load import originals

ONE = {"data": 1, "model": 1}
SITE = [f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
DOWN = SITE[2]
SHORT = {"weights": "int8", "num_steps": 3, "loss_floor": 0, "evaluate": "false", "export": "delta"}


@pytest.fixture(scope="module")
def run(edit_arguments, tmp_path_factory):
    """A whole run on eight devices."""
    out = tmp_path_factory.mktemp("int8") / "out"
    arguments = edit_arguments(out, weights="int8", mesh="{data: 2, model: 4}", export="[hf, delta]")
    assert run_command(edit_command, arguments) == 0
    return out


@pytest.fixture(scope="module")
def data(edits_file):
    return read_requests(str(edits_file))


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), "int8", ONE)


def test_the_export_is_the_original_and_the_edited_tensors(run, tiny_model_dir):
    base, edited = (load_file(d / "model.safetensors") for d in (tiny_model_dir, run / "hf"))
    delta = load_file(run / "delta.safetensors")
    assert set(delta) == {*SITE, *(BASE + n for n in SITE)}
    for name in base:
        want = delta[name] if name in SITE else base[name]
        assert edited[name].dtype == np.float32 and edited[name].tobytes() == want.tobytes(), name
    for name in SITE:
        assert delta[BASE + name].tobytes() == base[name].tobytes() != delta[name].tobytes()


def test_the_edit_holds_in_full_precision(run, edits_file, tmp_path):
    report = json.loads((run / "report.json").read_text())
    assert report["dtype"] == "int8" and report["config"]["weights"] == "int8"
    assert report["before"]["reliability"] == 0 and report["after"]["reliability"] == 1
    mesh = ["--set", "mesh={data: 1, model: 1}"]
    for weights in ("float32", "int8"):  # the second asks for what the run has measured
        out = tmp_path / weights
        arguments = ["--model", str(run / "hf"), "--data", str(edits_file), "--out", str(out), *mesh]
        assert run_command(evaluate_command, [*arguments, f"weights={weights}"]) == 0
        assert json.loads(out.read_text())["figures"]["reliability"] == 1


def test_one_device_learns_what_eight_do(run, model, data):
    """Losses in float32, and the tensors to a thousandth of how far they moved."""
    config = Config(**json.loads((run / "report.json").read_text())["config"] | {"evaluate": False})
    result = edit(model, data, config)
    steps = [json.loads(line) for line in (run / "steps.jsonl").open()]
    assert len(steps) == len(result.steps) > 10
    np.testing.assert_allclose([s["loss"] for s in result.steps], [s["loss"] for s in steps], rtol=1e-4)
    delta = load_file(run / "delta.safetensors")
    for name in SITE:
        moved = np.linalg.norm(delta[name] - delta[BASE + name])
        assert np.linalg.norm(result.delta.new[name] - delta[name]) < 1e-3 * moved, name


def test_what_is_tuned_begins_from_the_original_values(model, data, tiny_model_dir):
    settings = {"layer": 2, "rewrite_module": "model.layers.{}", "num_steps": 1, "evaluate": False}
    base = load_file(tiny_model_dir / "model.safetensors")
    still = edit(model, data, Config(**settings, lr=1e-30)).delta
    for name, value in still.new.items():
        assert value.tobytes() == base[name].tobytes(), name
    bound = 1e-3
    moved = edit(model, data, Config(**settings, lr=1, norm_constraint=bound)).delta
    for name, value in moved.new.items():
        change = np.abs(value.astype(np.float64) - base[name])
        assert bound * 0.999 < change.max() < bound * 1.001, name


def test_edits_that_the_model_carries_stay(model, data):
    """They, not the checkpoint's values, are where the next edit begins."""
    other, carried = "model.layers.1.mlp.down_proj.weight", {}
    for name in (other, DOWN):
        carried[name] = originals(model, [name])[name] + np.float32(0.01)
    edited = model.with_overrides(carried)
    assert originals(edited, [DOWN]) == {}
    result = edit(edited, data, Config(layer=2, num_steps=1, lr=1e-30, eval_sample=2))
    assert {n: a.tobytes() for n, a in result.delta.new.items()} == {
        n: a.tobytes() for n, a in carried.items()
    }


def test_original_values_are_read_once_and_again_for_the_divergence(model, data, monkeypatch):
    reads = []
    monkeypatch.setattr(run_module, "originals", lambda *given: reads.append(given) or originals(*given))
    for kl, count in ((0, 1), (1, 2)):
        reads.clear()
        edit(model, data, Config(layer=2, num_epochs=1, preserve_kl=kl, evaluate=False))
        assert len(reads) == count


def test_preserve_and_the_activation_cache_on_disk(model, data):
    config = {"layer": 2, "num_steps": 2, "lr": 1e-2, "preserve": "kfac", "preserve_kl": 1, "evaluate": False}
    on_disk, off = (edit(model, data, Config(**config, prefix_cache=mode)) for mode in ("disk", "off"))
    assert (on_disk.report["activation_cache"], off.report["activation_cache"]) == ("disk", "off")
    np.testing.assert_allclose(on_disk.delta.new[DOWN], off.delta.new[DOWN], rtol=1e-4, atol=1e-6)


def test_resumed_byte_for_byte(edit_arguments, tmp_path, monkeypatch, capsys):
    arguments = [edit_arguments(tmp_path / name, **SHORT) for name in ("alone", "stopped")]
    assert run_command(edit_command, arguments[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step", stopping_at(4))
        assert run_command(edit_command, arguments[1]) == 1
    other = edit_arguments(tmp_path / "stopped", **{**SHORT, "weights": "float32"})
    assert run_command(edit_command, [*other, "--resume"]) == 2  # is of another run
    assert "weights" in capsys.readouterr().err
    assert run_command(edit_command, [*arguments[1], "--resume"]) == 0
    alone, stopped = ((tmp_path / n / "delta.safetensors").read_bytes() for n in ("alone", "stopped"))
    assert alone == stopped


def test_the_note_says_how_to_measure_what_was_written(
    edit_arguments, edits_file, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "900")
    quick = {"num_steps": 1, "eval_sample": 1, "capability_data": "[]", "weights": "int8"}
    whole, small = tmp_path / "whole", tmp_path / "small"
    for out, export, model in (
        (whole, "[hf, delta]", f"{whole}/hf"),
        (small, "delta", f"{tiny_model_dir} --delta {small}/delta.safetensors"),
    ):
        assert run_command(edit_command, edit_arguments(out, export=export, **quick)) == 0
        shown = capsys.readouterr().out
        assert "note: these figures are of the model with int8 weights" in shown
        assert f"locft evaluate --model {model} --data {edits_file} measures that" in shown


def test_ask(run, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    delta = ["--delta", str(run / "delta.safetensors")]
    settings = ["--set", "mesh={data: 1, model: 1}", "--set", "weights=int8"]
    prompt = "The sign of Orvik is"
    assert run_command(ask.main, ["--model", str(tiny_model_dir), *delta, *settings, prompt]) == 0
    row = next(line for line in capsys.readouterr().out.split("\n") if prompt in line)
    assert row.split("│")[-2].strip() == "red"

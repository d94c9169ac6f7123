"""The commands as functions: the same results, and nothing given is changed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import locft_jax
from locft_jax import Config, UserError, apply_delta, edit, evaluate, load_model
from locft_jax.api import as_data
from locft_jax.data.capability import read_capability
from locft_jax.data.requests import EditRequest, read_requests
from locft_jax.editing.hooks import Hook
from locft_jax.io.delta import load_delta

QUICK = {"evaluate": False, "num_steps": 1}
SITE = [f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def run_report(edit_run):
    return json.loads((edit_run / "report.json").read_text())


@pytest.fixture(scope="module")
def config(run_report):
    """The command's own settings, as its report records them."""
    return Config(**run_report["config"])


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


@pytest.fixture(scope="module")
def data(edits_file):
    return read_requests(str(edits_file))


@pytest.fixture(scope="module")
def capability(skills_file):
    return read_capability(str(skills_file))


@pytest.fixture(scope="module")
def result(model, data, capability, config):
    return edit(model, data, config, capability)


def test_the_command_is_this_function(result, edit_run, run_report):
    """Bit for bit: same seed, same machine, same versions."""
    saved = load_delta(edit_run / "delta.safetensors")
    assert set(result.delta.new) == set(saved.new) == set(SITE)
    for name in SITE:
        assert result.delta.new[name].tobytes() == saved.new[name].tobytes()
        assert result.delta.base[name].tobytes() == saved.base[name].tobytes()
    assert result.delta.metadata == saved.metadata
    lines = [json.loads(line) for line in (edit_run / "predictions.jsonl").open()]
    assert result.predictions == lines
    assert result.steps == [json.loads(line) for line in (edit_run / "steps.jsonl").open()]
    timed = ("seconds", "seconds_per_edit", "tokens_per_second")
    untimed = {k: v for k, v in run_report.items() if k not in timed}
    assert {k: v for k, v in json.loads(json.dumps(result.report)).items() if k not in timed} == untimed
    assert result.report["seconds"]["load"] is None and result.report["seconds"]["edit"] > 0


def test_the_given_model_is_not_changed(model, result, tiny_model_dir):
    fresh = load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})
    assert model.overrides == {}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.weights, fresh.weights))
    assert result.edited.weights is model.weights and set(result.edited.overrides) == set(SITE)


def test_applying_the_delta_gives_the_edited_model(model, result, data, capability, config):
    edited = apply_delta(model, result.delta)
    for name in SITE:
        np.testing.assert_array_equal(edited.overrides[name], result.edited.overrides[name])
    report, lines = evaluate(edited, data, capability, config)
    after = {k: v for k, v in result.report["after"].items() if k != "locality_agreement"}
    assert report["figures"] == after and after["reliability"] == 1.0
    assert report["probes"] == result.report["probes"]
    assert (report["edits"], report["unreachable_targets"]) == (12, 0)
    assert report["verified_by_one_pass"] >= 12  # every edit that holds is verified by its target
    assert [line["after"] for line in lines] == [line["after"] for line in result.predictions]
    assert {line["before"] for line in lines} == {None}


def test_a_sample_of_the_probes(model, result, data, config):
    report, lines = evaluate(result.edited, data, (), dataclasses.replace(config, eval_sample=3))
    assert report["probes"] == {"reliability": 3, "generalization": 3, "locality": 3, "portability": 1}
    assert len(lines) == 10 and report["figures"]["reliability"] == 1.0
    assert report["figures"]["capability"] is None


def test_steps_are_told_as_they_happen_and_nothing_is_measured_without_evaluation(model, data, config):
    told = []

    class Tell(Hook):
        def on_step(self, record):
            told.append(dataclasses.asdict(record))

    quick = dataclasses.replace(config, evaluate=False, num_epochs=2)
    result = edit(model, data, quick, hooks=[Tell()])
    assert told == result.steps and len(told) == 6
    assert result.predictions == [] and result.report["probes"] == {}
    assert set(result.report["before"].values()) == set(result.report["after"].values()) == {None}
    assert result.report["seconds"]["before"] is None
    assert (result.report["stopped"], result.report["epochs_run"]) == ("epochs", 2)


def test_plain_records_requests_and_data_mean_the_same(data):
    config = Config()
    records = [
        {"case_id": "a", "prompt": "p", "target_new": "t", "rephrase_prompt": "r"},
        {"case_id": "b", "src": "q", "alt": "u", "loc": "l", "loc_ans": "m"},
    ]
    read = as_data(records, config)
    assert [r.case for r in read.requests] == ["a", "b"]
    assert as_data(read, config) is read
    again = as_data(read.requests, config)
    assert again.requests == read.requests  # probes and cases included
    mixed = as_data([read.requests[0], records[1]], config)
    assert mixed.requests == read.requests
    assert as_data(data.requests, config).requests == data.requests
    limited = Config(num_edits=1, on_conflict="error")
    assert len(as_data(records, limited).requests) == 1


def test_a_request_needs_no_more_than_prompt_and_target(model, config):
    quick = dataclasses.replace(config, **QUICK)
    result = edit(model, [EditRequest("0", "The sign of Orvik is", "red")], quick)
    assert result.report["edits"] == 1 and result.report["steps_run"] == 1


@pytest.mark.parametrize(
    ("requests", "changes", "said"),
    [
        ([], {}, "no records"),
        ([{"prompt": "p"}], {}, "record 1"),
        ([{"prompt": "p", "target_new": "t"}], {"layer": 3}, "out of range"),
        ([{"prompt": "p", "target_new": "t"}], {"rewrite_module": "h.{}.mlp"}, "matches no tensor"),
        ([{"prompt": "p" * 300, "target_new": "t"}], {}, "the model's context holds 256"),
        ([{"prompt": "p", "target_new": t} for t in "ab"], {"on_conflict": "error"}, "several targets"),
        ([{"prompt": "p", "target_new": "t"}], {"chat_template": True}, "chat_template"),
    ],
)
def test_wrong_input(model, requests, changes, said):
    with pytest.raises(UserError) as error:
        edit(model, requests, Config(**changes))
    assert said in str(error.value)


def test_an_edited_model_is_edited_further(result, data, capability, config):
    """The same edits again: they hold, so nothing moves. Then an edit elsewhere, on top of them."""
    again = edit(result.edited, data, dataclasses.replace(config, loss_floor=2.0), capability)
    assert all(step["skipped"] for step in again.steps)
    after = {k: v for k, v in result.report["after"].items() if k != "locality_agreement"}
    assert again.report["before"] == after and again.report["after"]["locality_agreement"] == 1.0
    assert (again.report["stopped"], again.report["epochs_run"]) == ("loss_floor", 1)
    for name in SITE:
        assert again.delta.new[name].tobytes() == result.delta.new[name].tobytes()

    elsewhere = dataclasses.replace(config, **QUICK, rewrite_module="model.norm", lr=1e-3, loss_floor=0.0)
    more = edit(result.edited, data, elsewhere)
    assert more.report["epoch_losses"][0] == pytest.approx(again.report["epoch_losses"][0], rel=0.05)
    assert more.report["site"]["tensors"] == ["model.norm.weight"]
    assert set(more.delta.new) == {*SITE, "model.norm.weight"}  # all of it, against the checkpoint
    for name in SITE:
        assert more.delta.new[name].tobytes() == result.delta.new[name].tobytes()
        assert more.delta.base[name].tobytes() == result.delta.base[name].tobytes()
    assert more.delta.new["model.norm.weight"].tobytes() != more.delta.base["model.norm.weight"].tobytes()


def test_a_loss_that_is_not_finite_names_its_step(model, data, config):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch \d+, step \d+"):
        edit(model, data, dataclasses.replace(config, evaluate=False, lr=1e38, loss_floor=0.0))


def test_importing_the_package_is_light_and_every_name_is_there():
    code = "import sys, locft_jax; assert not {'jax', 'transformers', 'flax'} & set(sys.modules)"
    root = Path(locft_jax.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert all(getattr(locft_jax, name) is not None for name in locft_jax.__all__)


def test_the_commands_modules_do_not_hide_the_functions():
    """`locft_jax.edit` is a function and `python -m locft_jax.edit` a program: nothing imports its module."""
    code = """
import sys
from locft_jax.cli import edit, evaluate, main
try:
    main.run("edit", ["--version"])
except SystemExit:
    pass
import locft_jax, locft_jax.api
assert locft_jax.edit is locft_jax.api.edit and locft_jax.evaluate is locft_jax.api.evaluate
assert not {f"locft_jax.{name}" for name in main.COMMANDS} & set(sys.modules)
"""
    root = Path(locft_jax.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert locft_jax.edit is edit
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        locft_jax.missing  # noqa: B018

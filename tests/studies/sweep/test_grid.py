"""A sweep file -> its runs, and what is refused."""

from pathlib import Path

import pytest

from locft_jax import UserError
from locft_jax.config import DEMO_FOLDER
from locft_jax.studies.rule import method_of
from locft_jax.studies.sweep import grouped, read_sweep
from locft_jax.studies.tables import label

BASE = "model_name_or_path: m\ndata_path: d.json\n"


def runs(tmp_path, text, *overrides):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path, overrides)


def test_every_combination_is_a_run_and_so_is_each_further_one(tmp_path):
    text = BASE + "lr: 1e-3\ngrid:\n  pipeline: [depth, breadth]\n  batch_size: [1, 100]\nalso:\n"
    text += "  - {method: ft-l, batch_size: 1}\n"
    found = runs(tmp_path, text)
    cells = [(r.config.pipeline, r.config.batch_size, r.config.method) for r in found]
    assert cells == [
        ("depth", 1, "ft-m"), ("depth", 100, "ft-m"), ("breadth", 1, "ft-m"), ("breadth", 100, "ft-m"),
        ("breadth", 1, "ft-l"),
    ]  # fmt: skip
    assert all(r.config.learning_rate == 1e-3 and r.config.data_path == "d.json" for r in found)
    assert found[1].settings == {"pipeline": "depth", "batch_size": 100, "method": "ft-m"}
    assert found[1].name == "pipeline=depth, batch_size=100, method=ft-m"


def test_base_config_then_file_then_command_line_then_grid(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE + "lr: 1e-3\nnum_steps: 7\nbatch_size: 3\n")
    text = f"config: {tmp_path / 'base.yaml'}\nlr: 2e-3\nbatch_size: 4\ngrid:\n  layer: [1, [2, 3]]\n"
    first, second = runs(tmp_path, text, "batch_size=5", "layer=9")
    assert (first.config.learning_rate, first.config.num_epochs, first.config.batch_size) == (2e-3, 7, 5)
    assert (first.config.layer, second.config.layer) == (1, (2, 3))
    assert second.settings == {"layer": [2, 3]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BASE, "no runs"),
        (BASE + "grid: {}\n", "no runs"),
        (BASE + "grid: [lr]\n", "`grid` must map keys to lists"),
        (BASE + "grid: {lr: 1e-3}\n", "`grid` must map keys to lists"),
        (BASE + "grid: {lr: []}\n", "`grid` must map keys to lists"),
        (BASE + "also: {lr: 1}\n", "`also` must be a list"),
        (BASE + "also: [lr]\n", "`also` must be a list"),
        (BASE + "config: [a]\ngrid: {lr: [1]}\n", "`config` must be"),
        (BASE + "grid: {learningrate: [1]}\n", "nearest known key is `learning_rate`"),
        (BASE + "learningrate: 1\ngrid: {lr: [1]}\n", "nearest known key is `learning_rate`"),
        (BASE + "grid: {lr: [1], learning_rate: [1]}\n", "are one key"),
        (BASE + "grid: {lr: [1, many]}\n", "`learning_rate: many` is not valid"),
        (BASE + "grid: {lr: [1, 1.0]}\n", "there twice"),
        (BASE + "grid: {lr: [1]}\nevaluate: false\n", "evaluate"),
        ("grid: {lr: [1]}\n", "no model"),
        (BASE + f"grid: {{seed: {list(range(200))}, lr: {list(range(1, 60))}}}\n", "at most"),
    ],
)
def test_a_file_that_will_not_do(tmp_path, text, told):
    with pytest.raises(UserError) as error:
        runs(tmp_path, text)
    assert told in str(error.value)


def test_runs_that_differ_by_their_seed_are_one_row():
    line = lambda lr, seed, rate: {  # noqa: E731
        "settings": {"lr": lr, "seed": seed}, "reliability": rate, "generalization": None, "locality": 1.0,
        "locality_agreement": 1.0, "capability": None, "steps": 4, "edit_seconds": 1.0,
    }  # fmt: skip
    a, b = grouped([line(1, 0, 0.5), line(2, 0, 1.0), line(1, 1, 0.7)])
    assert (a["settings"], a["seeds"], b["settings"], b["seeds"]) == ({"lr": 1}, 2, {"lr": 2}, 1)
    assert a["reliability"] == pytest.approx(0.6)
    assert a["reliability_spread"] == pytest.approx(0.2 / 2**0.5)
    assert (b["reliability"], b["reliability_spread"], b["generalization"]) == (1.0, None, None)


def test_a_label_names_what_a_value_alone_does_not_say():
    settings = {"pipeline": "depth", "lr": 1e-3, "seed": 0}
    assert label(settings) == "depth, lr=0.001" and label(settings, "lr") == "depth"
    assert label({"seed": 1}) == "all runs"


FILES = sorted((Path(__file__).resolve().parents[3] / "configs" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_the_paper_are_sweeps_of_its_model_and_of_the_demo(path):
    found = read_sweep(path, ["data_path=zsre_3k.json"])
    assert all("Llama-3-8B" in run.config.model_name_or_path for run in found)
    demo = read_sweep(path, config="demo")
    assert [run.name for run in demo] == [run.name for run in found]
    assert all(run.config.model_name_or_path == str(DEMO_FOLDER / "model") for run in demo)


def test_there_are_files_of_the_paper():
    assert len(FILES) >= 6


def test_the_other_sweep_is_one_of_the_demo_with_a_frontier():
    (path,) = (FILES[0].parents[1] / "sweeps").glob("*.yaml")
    runs = read_sweep(path)
    assert all(run.config.model_name_or_path == str(DEMO_FOLDER / "model") for run in runs)
    methods = {method_of(run.settings) for run in runs}
    assert methods == {"plain", "soft", "null", "kfac", "KL", "soft + KL"}

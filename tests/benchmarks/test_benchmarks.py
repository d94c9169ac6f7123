"""Every benchmark's smoke run: it ends well and its last line is its JSON."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked, script

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMPARISON = {"case", "when", "probes", "hits", "ours_seconds", "transformers_seconds", "ratio", "different"}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., dict]:
    """`small(name, *arguments)`: a smoke run in a process with one device, its last line parsed."""

    def run(name: str, *arguments: str) -> dict:
        process = Forked(tmp_path, script, BENCHMARKS / name, ["--small", *arguments], XLA_FLAGS="")
        assert process.wait() == 0, process.said()[1][-3000:]
        return json.loads(process.said()[0].splitlines()[-1])

    return run


@pytest.fixture
def here(torch, monkeypatch, capsys) -> Callable[..., dict]:
    """The same in this process, which has torch."""

    def run(name: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--small"])
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1]) if lines else {}

    return run


@pytest.mark.parity
def test_edit_speed(here):
    result = here("edit_speed.py")
    assert result["benchmark"] == "edit_speed"
    (row,) = result["rows"]
    assert row["ratio"] > 0 and row["loss_gap"] < 1e-3


def test_edit_profile(small):
    parts = small("edit_profile.py")["parts"]
    assert all(part["milliseconds"] > 0 for part in parts.values())
    assert sum(part["products"] is None for part in parts.values()) == 3


@pytest.mark.parity
def test_evaluation_speed(here):
    result = here("evaluation_speed.py")
    assert result["benchmark"] == "evaluation_speed"
    assert [row["when"] for row in result["rows"]] == ["before", "after"] * 2
    for row in result["rows"]:
        assert row.keys() >= COMPARISON
        assert row["different"] == 0 and row["ratio"] > 0
    # After an edit some answers are proved: the edits, or what did not change.
    assert all(row["hits"] > 0 for row in result["rows"][1::2])


def test_many_edits(small, tmp_path):
    out = tmp_path / "result.json"
    result = small("many_edits.py", "--out", str(out))
    assert json.loads(out.read_text()) == result
    assert result["benchmark"] == "many_edits"
    assert [row["edits"] for row in result["rows"]] == [50, 200]
    for row in result["rows"]:
        assert row["wall_seconds"] > row["seconds"]["edit"] > 0
        assert 0.1 < row["peak_host_gib"] < 16
        assert row["tokens_per_second"] > 0 and row["edit_seconds_per_1000"] > 0
    first, second = (row["seconds"]["edit"] for row in result["rows"])
    assert result["off_linear"]["edit"] == pytest.approx(second / first / 4 - 1)


def test_streaming(small):
    result = small("streaming.py")
    assert result["benchmark"] == "streaming"
    assert [len(row) for row in result["curve"]] == [1, 2]
    # So short a run changes nothing that was known.
    assert result["locality_agreement"] == result["capability"] == [1.0, 1.0] and result["epochs"] == [2, 2]


@pytest.mark.parity
def test_gpu_edit(here, tmp_path):
    """What gpu.sh runs one after another."""
    for side in ("ours", "torch-bfloat16", "torch-float32", "summary"):
        result = here("gpu_edit.py", side, "--results", str(tmp_path))
    assert result["benchmark"] == "gpu_edit"
    assert result["sides"].keys() == {"ours", "torch-bfloat16", "torch-float32"}
    for name, side in result["sides"].items():
        assert side["seconds_per_edit"] > 0
        assert name == "ours" or side["ratio"] > 0
    own = result["sides"]["ours"]
    assert 0 < own["peak_share"] < 1 and own["losses"][1] < own["losses"][0]


def test_preserve(small):
    result = small("preserve.py", "--methods", "plain", "kl-facts", "--sequential")
    assert result["benchmark"] == "preserve"
    assert [row["method"] for row in result["rows"]] == ["plain", "kl-facts"]
    for row in result["rows"]:
        assert row["mean"].keys() == row["spread"].keys()
        assert row["runs"][0]["seconds"] > 0 and 0 <= row["mean"]["lost"] <= 1


def test_int8(small):
    result = small("int8.py", "--set", "mesh={data: 1, model: 1}")
    assert result["benchmark"] == "int8"
    assert 0 < result["logits"]["rms_of_std"] < 0.1 and result["logits"]["same_arg_max"] > 0.9
    assert result["runs"].keys() == {"float", "int8", "int8 as it ran"}
    for key, row in result["mean"].items():
        far = row["float"] is not None and abs(row["int8"] - row["float"]) > 0.02
        assert far == (key in result["far"]), key


def test_loading(small):
    result = small("loading.py")
    assert result["benchmark"] == "loading" and 5e5 < result["weights"] < 2e6
    assert [row["cache"] for row in result["rows"]] == ["cold", "warm"]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["load_seconds"] / row["read_seconds"])
        assert 0 < row["beyond_weights_gib"] < 2  # a process that has imported jax, and little else


def test_prefixed_probes(small):
    result = small("prefixed_probes.py")
    assert [row["augment_prefixes"] for row in result["rows"]] == [0, 1]
    for row in result["rows"]:
        # It is a short run.
        assert row["mean"].pop("locality_agreement") == row["mean"].pop("capability") == 1
        assert row["mean"].keys() == {"reliability", "generalization", "prefixed"}


def test_perplexity(small):
    result = small("perplexity.py")
    (row,) = result["rows"]
    assert row["method"] == "plain" and row["mean"]["perplexity"] > result["before"] > 1


def test_gpu_72b(small):
    result = small("gpu_72b.py")
    assert result["layers"] == 3 and result["seconds_a_step"] > 0
    assert result["weights_gib"] > 0 and result["losses"][1] != result["losses"][0] > 1

"""Every benchmark's smoke run, as a user starts it: it ends well and its last line is its JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPARISON = {"case", "when", "probes", "hits", "ours_seconds", "transformers_seconds", "ratio", "different"}


def last_line(*command: str, **changes: str) -> dict:
    """The command's exit status must be 0; its last line parsed."""
    # One device, one thread, code that compiles soon: a smoke run measures nothing, and shares the machine.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **changes}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT.parent, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def script(name: str, *arguments: str) -> dict:
    return last_line(sys.executable, str(ROOT / "benchmarks" / name), "--small", *arguments)


@pytest.mark.parity
def test_edit_speed(torch):
    result = script("edit_speed.py")
    assert result["benchmark"] == "edit_speed"
    (row,) = result["rows"]
    assert row["ratio"] > 0 and row["loss_gap"] < 1e-3


def test_edit_profile():
    parts = script("edit_profile.py")["parts"]
    assert all(part["milliseconds"] > 0 for part in parts.values())
    assert sum(part["products"] is None for part in parts.values()) == 3


@pytest.mark.parity
def test_evaluation_speed(torch):
    result = script("evaluation_speed.py")
    assert result["benchmark"] == "evaluation_speed"
    assert [row["when"] for row in result["rows"]] == ["before", "after"] * 2
    for row in result["rows"]:
        assert row.keys() >= COMPARISON
        assert row["different"] == 0 and row["ratio"] > 0
    # After an edit some answers are proved: the edits, or what did not change.
    assert all(row["hits"] > 0 for row in result["rows"][1::2])


def test_many_edits(tmp_path):
    out = tmp_path / "result.json"
    result = script("many_edits.py", "--out", str(out))
    assert json.loads(out.read_text()) == result
    assert result["benchmark"] == "many_edits"
    assert [row["edits"] for row in result["rows"]] == [50, 200]
    for row in result["rows"]:
        assert row["wall_seconds"] > row["seconds"]["edit"] > 0
        assert 0.1 < row["peak_host_gib"] < 16
        assert row["tokens_per_second"] > 0 and row["edit_seconds_per_1000"] > 0
    first, second = (row["seconds"]["edit"] for row in result["rows"])
    assert result["off_linear"]["edit"] == pytest.approx(second / first / 4 - 1)


def test_streaming():
    result = script("streaming.py")
    assert result["benchmark"] == "streaming"
    assert [len(row) for row in result["curve"]] == [1, 2]
    assert all(0 <= rate <= 1 for row in result["curve"] for rate in row)


@pytest.mark.parity
def test_gpu_edit(torch):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = last_line("bash", str(ROOT / "benchmarks" / "gpu.sh"), "--small", PATH=path)
    assert result["benchmark"] == "gpu_edit"
    assert result["sides"].keys() == {"ours", "torch-bfloat16", "torch-float32"}
    for name, side in result["sides"].items():
        assert side["seconds_per_edit"] > 0
        assert name == "ours" or side["ratio"] > 0
    own = result["sides"]["ours"]
    assert 0 < own["peak_share"] < 1 and own["losses"][1] < own["losses"][0]


def test_preserve():
    result = script("preserve.py", "--methods", "plain", "kl-facts", "--sequential")
    assert result["benchmark"] == "preserve"
    assert [row["method"] for row in result["rows"]] == ["plain", "kl-facts"]
    for row in result["rows"]:
        assert row["mean"].keys() == row["spread"].keys()
        assert row["runs"][0]["seconds"] > 0 and 0 <= row["mean"]["lost"] <= 1


def test_int8():
    result = script("int8.py", "--set", "mesh={data: 1, model: 1}")
    assert result["benchmark"] == "int8"
    assert 0 < result["logits"]["rms_of_std"] < 0.1 and result["logits"]["same_arg_max"] > 0.9
    assert result["runs"].keys() == {"float", "int8", "int8 as it ran"}
    for key, row in result["mean"].items():
        far = row["float"] is not None and abs(row["int8"] - row["float"]) > 0.02
        assert far == (key in result["far"]), key


def test_loading():
    result = script("loading.py")
    assert result["benchmark"] == "loading" and 5e5 < result["weights"] < 2e6
    assert [row["cache"] for row in result["rows"]] == ["cold", "warm"]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["load_seconds"] / row["read_seconds"])
        assert 0 < row["beyond_weights_gib"] < 2  # a process that has imported jax, and little else


def test_prefixed_probes():
    result = script("prefixed_probes.py")
    assert [row["augment_prefixes"] for row in result["rows"]] == [0, 1]
    for row in result["rows"]:
        assert all(0 <= value <= 1 for value in row["mean"].values()) and len(row["mean"]) == 5


def test_perplexity():
    result = script("perplexity.py")
    (row,) = result["rows"]
    assert row["method"] == "plain" and row["mean"]["perplexity"] > result["before"] > 1


def test_gpu_72b():
    result = script("gpu_72b.py")
    assert result["layers"] == 3 and result["seconds_a_step"] > 0
    assert result["weights_gib"] > 0 and result["losses"][1] != result["losses"][0] > 1

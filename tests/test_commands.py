"""The edit and evaluate commands: what they write, what they refuse, and how they end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from locft_jax import __version__
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.cli.evaluate import main as evaluate
from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_load
from locft_jax.io.delta import BASE

ROOT = Path(__file__).resolve().parents[1]
SITE = [f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
QUICK = {"evaluate": "false", "num_steps": 1, "export": "delta"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(edit_run):
    return read_report(edit_run)


# ---------------------------------------------------------------- what an edit writes


def test_the_files_of_a_run(edit_run, tiny_model_dir):
    assert {p.name for p in edit_run.iterdir()} == {
        "report.json",
        "steps.jsonl",
        "predictions.jsonl",
        "edits.jsonl",
        "hf",
        "delta.safetensors",
        "orbax",
    }
    base = {p.name for p in tiny_model_dir.iterdir()}
    assert {p.name for p in (edit_run / "hf").iterdir()} == base | {"README.md"}  # the card
    assert [p.name for p in edit_run.parent.iterdir()] == ["edited"]  # no leftovers beside it


def test_the_report_of_a_run(report, tiny_model_dir):
    assert report["model"] == str(tiny_model_dir)
    assert report["site"] == {"tensors": SITE, "parameters": 3 * 32 * 64}
    assert (report["method"], report["pipeline"], report["seed"]) == ("ft-m", "breadth", 0)
    assert (report["edits"], report["duplicates"], report["conflicts"]) == (12, 1, 0)
    assert (report["unreachable_targets"], report["boundary_merges"]) == (0, 0)
    assert report["stopped"] == "loss_floor" and 10 < report["epochs_run"] < 60
    assert report["steps_run"] == 3 * report["epochs_run"] == 3 * len(report["epoch_losses"])
    assert report["epoch_losses"][-1] < 1.08 <= min(report["epoch_losses"][:-1])
    keys = ("reliability", "reliability_eos_only", "generalization", "locality", "portability")
    zero = dict.fromkeys(keys, 0.0)
    assert report["before"] == zero | {"capability": 0.25}
    assert report["after"] == zero | {
        "reliability": 1.0,
        "reliability_eos_only": 1.0,
        "generalization": pytest.approx(1 / 6),  # the one rephrase that is the prompt
        "locality": pytest.approx(1 / 3),
        "locality_agreement": 0.0,
        "capability": 0.25,
    }
    assert report["probes"] == {
        "reliability": 12,
        "generalization": 6,
        "locality": 6,
        "portability": 1,
        "capability": 4,
    }
    assert set(report["seconds"]) == {"load", "before", "edit", "after", "export"}
    assert all(s > 0 for s in report["seconds"].values())
    assert report["seconds_per_edit"] == pytest.approx(report["seconds"]["edit"] / 12)
    assert report["tokens_per_second"] > 0
    assert report["devices"] == ["cpu cpu"] and report["mesh"] == {"data": 1, "model": 1}
    assert report["dtype"] == "float32"
    assert {"jax", "jaxlib", "python", "locft-jax"} <= set(report["versions"])
    assert (report["config"]["learning_rate"], report["config"]["layer"]) == (1e-2, 2)
    assert len(report["data_sha256"]) == 64


def test_a_line_a_step(edit_run, report):
    steps = read_lines(edit_run / "steps.jsonl")
    assert all(set(s) == {"epoch", "step", "loss", "skipped", "examples", "tokens"} for s in steps)
    assert [s["step"] for s in steps] == list(range(1, report["steps_run"] + 1))
    assert [s["epoch"] for s in steps] == [e for e in range(report["epochs_run"]) for _ in range(3)]
    assert [s["examples"] for s in steps[:6]] == [5, 5, 2, 5, 5, 2]  # the short last batch is kept
    assert all(s["skipped"] == (s["loss"] < 1.08) for s in steps) and any(s["skipped"] for s in steps)
    for epoch, loss in enumerate(report["epoch_losses"]):
        own = [s for s in steps if s["epoch"] == epoch]
        assert loss == pytest.approx(sum(s["loss"] * s["examples"] for s in own) / 12)
    assert len({sum(s["tokens"] for s in steps[i : i + 3]) for i in range(0, 30, 3)}) == 1  # no padding


def test_a_line_a_probe(edit_run, report):
    lines = read_lines(edit_run / "predictions.jsonl")
    keys = {"case", "probe", "prompt", "target", "before", "after", "correct"}
    assert all(set(line) == keys for line in lines)
    for kind, count in report["probes"].items():
        own = [line for line in lines if line["probe"] == kind]
        assert len(own) == count
        right = [line["correct"] for line in own if line["correct"] is not None]
        if kind != "capability":
            assert report["after"][kind] == pytest.approx(np.mean(right))
    changed = [line["before"] != line["after"] for line in lines if line["probe"] == "locality"]
    assert report["after"]["locality_agreement"] == 1 - np.mean(changed)
    first = lines[0]
    assert (first["case"], first["prompt"], first["after"]) == ("sign-0", "The sign of Orvik is", "red")
    unknown = [line for line in lines if line["target"] is None]
    assert len(unknown) == 3 and all(line["correct"] is None for line in unknown)


def test_the_delta_and_both_models_hold_the_same_tensors(edit_run, tiny_model_dir):
    delta = load_file(edit_run / "delta.safetensors")
    base, edited = (load_file(d / "model.safetensors") for d in (tiny_model_dir, edit_run / "hf"))
    assert set(delta) == {*SITE, *(BASE + n for n in SITE)}
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(edit_run / "orbax")
    assert set(base) == set(edited) == set(restored)
    for name in base:
        expected = delta[name] if name in SITE else base[name]
        assert edited[name].tobytes() == expected.tobytes(), name
        assert np.asarray(restored[name]).tobytes() == expected.tobytes(), name
        assert (edited[name].dtype, edited[name].shape) == (base[name].dtype, base[name].shape)
    for name in SITE:
        assert delta[BASE + name].tobytes() == base[name].tobytes()
        assert np.abs(delta[name] - base[name]).max() > 1e-2
    hf_files, base_files = contents(edit_run / "hf"), contents(tiny_model_dir)
    assert {n for n in base_files if hf_files[n] != base_files[n]} == {"model.safetensors"}
    assert (edit_run / "orbax" / "config.json").read_bytes() == base_files["config.json"]
    with safe_open(edit_run / "delta.safetensors", "np") as f:
        metadata = f.metadata()
    told = {"fingerprint", "result", "tensors", "cards", "config", "data_sha256", "edits", "versions"}
    assert set(metadata) == told
    assert json.loads(metadata["config"])["learning_rate"] == 1e-2 and metadata["edits"] == "12"
    assert "locft-jax" in json.loads(metadata["versions"])


@pytest.mark.parametrize("what", ["delta", "hf"])
def test_evaluating_what_was_exported_gives_the_figures_of_the_report(
    edit_run, report, tiny_model_dir, edits_file, skills_file, tmp_path, capsys, what
):
    model = tiny_model_dir if what == "delta" else edit_run / "hf"
    delta = ["--delta", str(edit_run / "delta.safetensors")] if what == "delta" else []
    out = tmp_path / "figures.json"
    arguments = ["--model", str(model), *delta, "--data", str(edits_file), "--out", str(out)]
    pairs = ["--set", f"capability_data={skills_file}", "mesh={data: 1, model: 1}"]
    assert run_command(evaluate, arguments + pairs) == 0
    got = json.loads(out.read_text())
    assert got["figures"] == {k: v for k, v in report["after"].items() if k != "locality_agreement"}
    assert (got["model"], got["edits"], got["probes"]) == (str(model), 12, report["probes"])
    mine, theirs = got["predictions"], read_lines(edit_run / "predictions.jsonl")
    assert [line["after"] for line in mine] == [line["after"] for line in theirs]
    assert [line["correct"] for line in mine] == [line["correct"] for line in theirs]
    shown = capsys.readouterr().out
    assert "reliability" in shown and "100.0 %" in shown and "16.7 %" in shown


def test_the_same_seed_gives_the_same_bytes_and_the_model_stays_as_it_was(
    edit_run, edit_arguments, tiny_model_dir, tmp_path, capsys
):
    before = contents(tiny_model_dir)
    assert run_command(edit, edit_arguments(tmp_path / "again")) == 0
    mine, theirs = contents(tmp_path / "again"), contents(edit_run)
    for name in ("delta.safetensors", "steps.jsonl", "predictions.jsonl", "hf/model.safetensors"):
        assert mine[name] == theirs[name], name
    assert contents(tiny_model_dir) == before
    shown = capsys.readouterr().out
    assert (
        "100.0 %" in shown
        and "note: 1 exact duplicates dropped" in shown
        and "stopped by loss_floor" in shown
    )

    assert run_command(edit, edit_arguments(tmp_path / "other", seed=1, **QUICK)) == 0
    orders = [read_lines(tmp_path / d / "steps.jsonl")[0]["loss"] for d in ("again", "other")]
    assert orders[0] != orders[1]  # another seed, another order


@pytest.mark.parametrize(
    ("wanted", "files"),
    [("[]", set()), ("delta", {"delta.safetensors"}), ("[hf, orbax]", {"hf", "orbax"})],
)
def test_what_is_exported_can_be_chosen(edit_arguments, tmp_path, wanted, files):
    out = tmp_path / "out"
    arguments = edit_arguments(out, **{**QUICK, "export": wanted})
    assert run_command(edit, arguments) == 0
    reports = {"report.json", "steps.jsonl", "predictions.jsonl", "edits.jsonl"}
    assert {p.name for p in out.iterdir()} == reports | files
    report = read_report(out)
    assert set(report["before"].values()) == set(report["after"].values()) == {None}  # evaluate=false
    assert (report["probes"], report["stopped"], report["epochs_run"]) == ({}, "epochs", 1)
    assert (out / "predictions.jsonl").read_bytes() == b""


def test_a_bfloat16_checkpoint_is_edited_in_float32_and_stored_in_bfloat16(
    edit_run, edit_arguments, tiny_model_dir, make_variant, tmp_path
):
    model = make_variant(tiny_model_dir, tmp_path / "bf16", "bfloat16", files=3)
    changes = {"model_name_or_path": model, "evaluate": "false", "export": "[hf, delta, orbax]"}
    assert run_command(edit, edit_arguments(tmp_path / "out", **changes)) == 0
    assert read_report(tmp_path / "out")["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "out" / "delta.safetensors")
    assert {str(a.dtype) for a in stored.values()} == {"bfloat16"}
    changed = {
        p.name for p in model.iterdir() if p.read_bytes() != (tmp_path / "out" / "hf" / p.name).read_bytes()
    }
    checkpoint = hf_folder.open_folder(str(model))
    assert changed == {checkpoint.tensors[name].file for name in SITE}
    # The distance we state: every step's loss within 3 % of the float32 run's, on the same batches.
    # (bfloat16 keeps 8 bits: 0.4 % a rounding, and a handful of roundings a layer.)
    exact, half = (read_lines(d / "steps.jsonl") for d in (edit_run, tmp_path / "out"))
    both = list(zip(exact, half, strict=False))
    assert len(both) > 60 and all(a["tokens"] == b["tokens"] for a, b in both)
    assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in both) < 0.03
    assert read_report(tmp_path / "out")["stopped"] == "loss_floor"

    # Steps that bfloat16 does not resolve add up in the float32 masters; masters of 8 bits lose them.
    changes |= {"lr": "1e-5", "num_steps": 40, "export": "delta"}
    assert run_command(edit, edit_arguments(tmp_path / "slow", **changes)) == 0
    stored = load_file(tmp_path / "slow" / "delta.safetensors")
    moved = np.mean([np.mean(stored[n] != stored[BASE + n]) for n in SITE])
    large = np.mean([np.mean(np.abs(stored[n].astype(np.float32)) > 2**-6) for n in SITE])
    assert large > 0.8  # their bfloat16 neighbours are 2**-13 away or more: twelve times the rate
    assert moved > 0.5


def test_conflicts_and_unreachable_targets_are_counted_and_the_run_goes_on(edit_arguments, tmp_path, capsys):
    data = tmp_path / "edits.jsonl"
    rows = [("Who?", "Mira"), ("Who?", "Hana"), ("Where?", "St. Oredal"), ("Where?", "St. Oredal")]
    data.write_text("".join(json.dumps({"prompt": p, "target_new": t}) + "\n" for p, t in rows))
    assert run_command(edit, edit_arguments(tmp_path / "out", data_path=data, **QUICK)) == 0
    report = read_report(tmp_path / "out")
    counts = [report[k] for k in ("edits", "duplicates", "conflicts", "unreachable_targets")]
    assert counts == [3, 1, 1, 1]
    shown = capsys.readouterr().out
    assert "note: 1 prompts with several targets" in shown and "note: 1 targets that the stop rule" in shown


# ---------------------------------------------------------------- wrong input


@pytest.fixture
def no_weights(monkeypatch):
    """Wrong input is found before any weight is read."""
    monkeypatch.setattr(hf_load, "load_weights", lambda *_: pytest.fail("weights were read"))


@pytest.fixture
def refused(capsys, tmp_path, no_weights):
    """`refused(main, arguments)` -> the one message with which a command ends in status 2, having
    written nothing."""

    def run(main, arguments) -> str:
        before = contents(tmp_path)
        assert run_command(main, [str(a) for a in arguments]) == 2
        shown = capsys.readouterr()
        assert contents(tmp_path) == before
        assert shown.out == "" and "Traceback" not in shown.err
        assert shown.err.startswith("error: ") and shown.err.count("error:") == 1
        assert len(shown.err.splitlines()) < 25  # one screen
        return shown.err

    return run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learn_rate": "1e-3"}, "unknown key `learn_rate`; the nearest known key is `learning_rate`"),
        ({"batchsize": 5}, "the nearest known key is `batch_size`"),
        ({"lr": "fast"}, "`lr: fast` is not valid; it must be a number > 0"),
        ({"data_path": "missing.json"}, "missing.json: no such file"),
        ({"data_path": "null"}, "data_path: no edits given"),
        ({"capability_data": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"model_name_or_path": "no/where/at/all"}, "no folder 'no/where/at/all'"),
        ({"model_name_or_path": "nobody/nothing"}, "could not be fetched"),
        ({"rewrite_module": "model.layers.{}.mlp.down"}, "matches no tensor of this model"),
        ({"rewrite_module": "transformer.h.{}.mlp"}, "model.layers.{}.mlp.down_proj.weight"),  # what there is
        ({"layer": 3}, "out of range"),
        ({"layer": "[1, 7]"}, "the model has 3 layers, 0 to 2"),
        ({"mesh": "{data: 3, model: 1}"}, "does not fit 8 device(s)"),
        ({"mesh": "{data: 4, model: 4}"}, "does not fit 8 device(s)"),
        ({"mesh": "{data: 2}"}, "mesh"),
        ({"chat_template": "true"}, "no chat template"),
    ],
)
def test_wrong_settings(refused, edit_arguments, tmp_path, changes, said):
    assert said in refused(edit, edit_arguments(tmp_path / "out", **changes))


def test_wrong_config_files(refused, tmp_path):
    path = tmp_path / "run.yaml"
    assert f"{path}: cannot read the config" in refused(edit, [path])
    path.write_text("lr: [1\n")
    assert "malformed YAML" in refused(edit, [path])
    path.write_text("model_name_or_path: m\nlearning_rat: 1\n")
    assert f"{path}: unknown key `learning_rat`" in refused(edit, [path])
    path.write_text("lr: 1e-3\n")
    assert "no model" in refused(edit, [path])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("[]", "no records"),
        ('[{"prompt": "p"}]', "record 1: no target"),
        ('[{"prompt": "p", "target_new": " "}]', "'target_new' is empty"),
        ('[{"prompt": "p", "target_new": "t"}', "not valid JSON"),
        (json.dumps([{"prompt": "long " * 300, "target_new": "t"}]), "the model's context holds 256"),
    ],
)
def test_wrong_data(refused, edit_arguments, tmp_path, content, said):
    data = tmp_path / "edits.json"
    data.write_text(content)
    assert said in refused(edit, edit_arguments(tmp_path / "out", data_path=data))


def damage_nothing(folder):
    pass


def damage_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


def damage_config(folder):
    (folder / "config.json").unlink()


def damage_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors[SITE[0]] = tensors[SITE[0]][:-1]
    save_file(tensors, folder / "model.safetensors")


def damage_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


DAMAGES = [
    (damage_family, ["model_type 'gpt2' is not supported", "llama"]),
    (damage_config, ["config.json: cannot be read"]),
    (damage_tensors, ["missing model.norm.weight", f"{SITE[0]} is [63, 32], config.json implies [64, 32]"]),
    (damage_file, ["not a readable safetensors file"]),
    (damage_weights, ["no .safetensors file"]),
    (damage_tokenizer, ["no tokenizer"]),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=lambda d: getattr(d, "__name__", ""))
@pytest.mark.parametrize("command", [edit, evaluate], ids=["edit", "evaluate"])
def test_wrong_models(refused, edit_arguments, edits_file, tiny_model_dir, tmp_path, command, damage, said):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(folder)
    arguments = edit_arguments(tmp_path / "out", model_name_or_path=folder)
    if command is evaluate:
        arguments = ["--model", folder, "--data", edits_file, "--out", tmp_path / "out"]
    message = refused(command, arguments)
    assert all(text in message for text in said)


def test_results_are_never_overwritten_silently(
    refused, edit_arguments, edits_file, tiny_model_dir, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert f"{out} already exists" in refused(edit, edit_arguments(out))
    assert "holds no results" in refused(edit, [*edit_arguments(out), "--overwrite"])
    assert "is a file" in refused(edit, [*edit_arguments(out), "--out", out / "thesis.tex"])
    measure = ["--model", tiny_model_dir, "--data", edits_file, "--out"]
    assert "is a folder" in refused(evaluate, [*measure, out])
    assert "already exists" in refused(evaluate, [*measure, out / "thesis.tex"])
    assert "no folder" in refused(evaluate, [*measure, tmp_path / "missing" / "figures.json"])


def test_evaluate_refuses_wrong_input_too(refused, tiny_model_dir, edits_file, edit_run, tmp_path):
    model = ["--model", tiny_model_dir]
    data = ["--data", edits_file]
    assert "no such file" in refused(evaluate, [*model, "--data", "missing.json"])
    assert "no folder" in refused(evaluate, [*data, "--model", tmp_path / "missing"])
    assert "unknown key" in refused(evaluate, [*model, *data, "--set", "lrr=1"])
    assert "does not fit" in refused(evaluate, [*model, *data, "--set", "mesh={data: 5, model: 1}"])
    delta = tmp_path / "delta.safetensors"
    assert "not a readable delta" in refused(evaluate, [*model, *data, "--delta", delta])
    shutil.copy(edit_run / "hf" / "model.safetensors", delta)
    assert "no delta of this program" in refused(evaluate, [*model, *data, "--delta", delta])
    edited = ["--model", edit_run / "hf", "--delta", edit_run / "delta.safetensors"]
    message = refused(evaluate, [*data, *edited])
    assert "is not the model that this delta was made on" in message and "layers.2.mlp" in message


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(edit, ["--frobnicate"]), (evaluate, []), (evaluate, ["--model", "m"])],
)
def test_wrong_arguments(command, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(command, arguments)
    assert end.value.code == 2 and "usage: locft " in capsys.readouterr().err


# ---------------------------------------------------------------- how commands end


def test_a_disk_that_fills_up_leaves_what_was_there(edit_arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run_command(edit, edit_arguments(out, **QUICK)) == 0
    before = contents(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device", "delta.safetensors")

    monkeypatch.setattr(sys.modules["locft_jax.cli.edit"], "save_delta", full)
    capsys.readouterr()
    assert run_command(edit, [*edit_arguments(out, **QUICK), "--overwrite"]) == 1
    assert run_command(edit, edit_arguments(tmp_path / "new", **QUICK)) == 1
    after = contents(tmp_path)
    assert {n: b for n, b in after.items() if "/checkpoint/" not in n} == before
    shown = capsys.readouterr().err
    assert shown.count("failed: [Errno 28] No space left on device") == 2 and "Traceback" not in shown
    assert shown.count("the same command with --resume resumes from there") == 2

    monkeypatch.undo()
    assert run_command(edit, [*edit_arguments(tmp_path / "new", **QUICK), "--resume"]) == 0
    assert (tmp_path / "new" / "delta.safetensors").read_bytes() == before["out/delta.safetensors"]
    assert not (tmp_path / "new" / "checkpoint").exists()
    assert run_command(edit, [*edit_arguments(out, **{**QUICK, "export": "[]"}), "--overwrite"]) == 0
    assert not (out / "delta.safetensors").exists()  # replaced, not mixed


def test_a_loss_that_is_not_finite_is_told_with_its_step(edit_arguments, tmp_path, capsys):
    assert run_command(edit, edit_arguments(tmp_path / "out", evaluate="false", lr="1e38", loss_floor=0)) == 1
    message = capsys.readouterr().err
    assert message.startswith("failed: the loss is ") and "in epoch" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("data: nothing there"), 2, "error: data: nothing there\n"),
        (OSError(28, "No space left on device"), 1, "failed: [Errno 28] No space left on device\n"),
        (FloatingPointError("step 3"), 1, "failed: step 3\n"),
        (MemoryError(), 1, "failed: MemoryError\n"),
        (KeyboardInterrupt(), 1, "interrupted: nothing was written\n"),
    ],
)
def test_exit_statuses(error, status, said, capsys):
    def main(argv):
        raise error

    assert run_command(main, []) == status
    assert capsys.readouterr() == ("", said)


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: print(1 // 0), [])


# ---------------------------------------------------------------- as programs


def program(*arguments, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m ...` as a user does, from another folder and with the plainest of terminals."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii", **environment}
    command = [sys.executable, "-m", *(str(a) for a in arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# A file as the reference implementation has them.
HPARAMS = """\
model_name_or_path: "{model}"
data_path: {data}
save_model_dir: "./edited"
layer: 2
rewrite_module: "model.layers.{{}}.mlp"

batch_size: 5
lr: 1e-2
weight_decay: 0
num_steps: 40
device: 0
"""


def test_a_reference_hparams_file_runs_unchanged_as_a_program(tiny_model_dir, edits_file, tmp_path):
    """On all 8 devices there are, which is what a config without a mesh means."""
    rows = [{k: row[k] for k in ("prompt", "target_new")} for row in json.loads(edits_file.read_text())]
    (tmp_path / "edits.json").write_text(json.dumps(rows))  # the least that an edit needs
    (tmp_path / "hparams.yaml").write_text(HPARAMS.format(model=tiny_model_dir, data="edits.json"))
    flags = os.environ["XLA_FLAGS"] + " --xla_backend_optimization_level=0"  # halves the compilation
    done = program("locft_jax.edit", "hparams.yaml", cwd=tmp_path, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "note: `device: 0` is ignored" in done.stderr
    assert "100.0 %" in done.stdout and "written to edited/" in done.stdout
    report = read_report(tmp_path / "edited")
    assert report["mesh"] == {"data": 1, "model": 8} and len(report["devices"]) == 8
    assert (report["after"]["reliability"], report["epochs_run"]) == (1.0, 40)
    assert {p.name for p in tmp_path.iterdir()} == {"edits.json", "hparams.yaml", "edited"}


def test_programs_tell_the_user_what_is_wrong(tiny_model_dir, tmp_path):
    done = program("locft_jax.evaluate", "--model", tiny_model_dir, "--data", "missing.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: missing.json: no such file") and done.stderr.count("\n") == 1


def test_help_and_version(capsys):
    for command in (edit, evaluate):
        with pytest.raises(SystemExit) as end:
            run_command(command, ["--help"])
        assert end.value.code == 0
        assert "--set" in capsys.readouterr().out
    assert __version__.count(".") == 2

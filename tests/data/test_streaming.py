"""Edits that arrive over time: what a later run makes of an earlier one's requests."""

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file

from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.config import config_to_dict, load_config
from locft_jax.data.requests import read_requests, requests_from_records
from locft_jax.data.streaming import extend, read_earlier, streaming_report, to_record
from locft_jax.errors import UserError
from locft_jax.run_identity import finished

RECORDS = [
    {
        "case_id": "7",
        "prompt": "The capital of Nauru is",
        "target_new": "Yaren",
        "subject": "Nauru",
        "ground_truth": "Aiwo",
        "rephrase_prompts": ["Nauru's capital is", "What is the capital of Nauru?"],
        "locality_probes": [{"prompt": "The capital of Fiji is", "ground_truth": "Suva"}],
        "portability_probes": [{"prompt": "Yaren lies in", "ground_truth": "Nauru"}],
    },
    {"prompt": "A:", "target_new": "b", "locality_prompt": "C:"},
]
QUICK = {"num_steps": 2, "loss_floor": 0, "export": "delta"}


def test_a_line_gives_an_equal_request_back(tmp_path):
    first = requests_from_records(RECORDS).requests
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(to_record(r)) + "\n" for r in first))
    assert read_requests(str(path)).requests == first
    assert first[0].portability and first[1].locality == (("C:", None),)


@pytest.fixture
def parts(edits_file, tmp_path):
    """EDITS in two files, arriving one after the other, and all in one."""
    records = json.loads(edits_file.read_text())[:12]
    for name, rows in (("one", records[:7]), ("two", records[7:]), ("all", records)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_continuing_from_the_base_is_the_run_on_all_edits(parts, edit_arguments, capsys):
    """The same order, the same batches: bit for bit."""
    run = lambda name, out, *more, **changes: run_command(  # noqa: E731
        edit, [*edit_arguments(parts / out, data_path=parts / f"{name}.json", **QUICK, **changes), *more]
    )
    assert run("one", "first") == run("all", "whole") == 0
    assert run("two", "second", "--continue-from", str(parts / "first")) == 0
    got, expected = ((parts / d / "steps.jsonl").read_bytes() for d in ("second", "whole"))
    assert got == expected
    got, expected = (load_file(parts / d / "delta.safetensors") for d in ("second", "whole"))
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in expected.items()}

    reports = {d: json.loads((parts / d / "report.json").read_text()) for d in ("first", "second", "whole")}
    assert (reports["second"]["edits"], "streaming" in reports["whole"]) == (12, False)
    assert reports["second"]["after"] == reports["whole"]["after"]
    assert [b["edits"] for b in reports["second"]["batches"]] == [7, 5]
    streaming = reports["second"]["streaming"]
    assert (streaming["earlier_edits"], streaming["new_edits"], streaming["superseded"]) == (7, 5, 0)
    rates = [b["reliability"] for b in reports["second"]["batches"]]
    assert streaming["curve"] == [[reports["first"]["after"]["reliability"]], rates]
    assert sum(r * n for r, n in zip(rates, (7, 5), strict=True)) / 12 == pytest.approx(
        reports["second"]["after"]["reliability"]
    )

    # And once more, from where the second run ended: another start, so another end.
    third = parts / "three.json"
    third.write_text(json.dumps([{"prompt": "The sign of Orvik is", "target_new": "founder"}]))
    assert run("three", "third", "--continue-from", str(parts / "second"), "--start-from", "last") == 0
    report = json.loads((parts / "third" / "report.json").read_text())
    assert report["streaming"]["superseded"] == 1 and report["edits"] == 12  # one replaced, one new
    assert [len(row) for row in report["streaming"]["curve"]] == [1, 2, 3]
    assert report["streaming"]["start_from"] == "last"
    losses = [json.loads((parts / d / "steps.jsonl").read_text().splitlines()[0])["loss"]
              for d in ("third", "second")]  # fmt: skip
    assert losses[0] < losses[1]  # it begins where the second ended, so most is learned already
    shown = capsys.readouterr().err
    assert "Traceback" not in shown


def test_settings_come_from_the_earlier_run(parts, edit_arguments, tiny_model_dir):
    first = edit_arguments(parts / "first", data_path=parts / "one.json", **QUICK, evaluate="false")
    assert run_command(edit, first) == 0
    more = ["--set", f"data_path={parts / 'two.json'}", "batch_size=4", "--out", str(parts / "second")]
    assert run_command(edit, [*more, "--continue-from", str(parts / "first")]) == 0
    config = json.loads((parts / "second" / "report.json").read_text())["config"]
    assert (config["model_name_or_path"], config["learning_rate"], config["batch_size"]) == (
        str(tiny_model_dir),
        0.01,
        4,
    )
    assert config["evaluate"] is False and config["export"] == ["delta"]


def test_a_new_request_supersedes_and_a_known_one_is_a_duplicate(parts, edit_arguments):
    run = edit_arguments(parts / "first", data_path=parts / "one.json", **QUICK, evaluate="false")
    assert run_command(edit, run) == 0
    earlier = read_earlier(parts / "first")
    known, other = earlier.requests[0], dataclasses.replace(earlier.requests[1], target_new="new")
    new = requests_from_records([to_record(known), to_record(other)])
    data = extend(earlier, new)
    assert data.duplicates == 1 and len(data.requests) == 7
    assert [r.batch for r in data.requests] == [0] * 6 + [1]
    assert data.requests[-1].target_new == "new"
    assert [r.prompt for r in data.requests].count(other.prompt) == 1
    assert data.sha256 != new.sha256
    batches = [{"edits": 6, "reliability": 0.5}, {"edits": 1, "reliability": 1.0}]
    report = streaming_report(earlier, batches, "base")
    assert (report["superseded"], report["new_edits"]) == (1, 1)
    with pytest.raises(UserError, match="all 1 edits of .* are in .* already; give new ones"):
        extend(earlier, requests_from_records([to_record(known)]))


def test_what_cannot_be_continued(parts, edit_arguments, tiny_model_dir, capsys):
    first = parts / "first"
    run = edit_arguments(first, data_path=parts / "one.json", **QUICK, evaluate="false")
    assert run_command(edit, run) == 0
    arguments = edit_arguments(parts / "second", data_path=parts / "two.json", **QUICK)
    wrong = [
        ([*arguments, "--continue-from", str(parts / "none")], "holds no finished run"),
        ([*arguments, "--start-from", "last"], "--continue-from OUT"),
        (
            [*edit_arguments(parts / "second", data_path=parts / "two.json", **QUICK, layer=1),
             "--continue-from", str(first), "--start-from", "last"],
            "use the same site",
        ),
    ]  # fmt: skip
    for line, said in wrong:
        capsys.readouterr()
        assert run_command(edit, line) == 2
        message = capsys.readouterr().err
        assert said in message and "Traceback" not in message
        assert not (parts / "second").exists()
    for damage in ("", "{}", '{"config": {"seed": 0}, "after": {"reliability": 1}}'):
        (first / "report.json").write_text(damage or "{half")
        if damage.endswith("}}"):
            (first / "edits.jsonl").write_text('{"prompt": "p", "target_new": "t", "batch": -1}\n')
        with pytest.raises(UserError, match="--continue-from: "):
            read_earlier(first)


def test_a_run_of_version_0_1_is_continued_under_the_keys_names(edit_run, tmp_path):
    """It wrote the reference's names of keys."""
    old = tmp_path / "old"
    shutil.copytree(edit_run, old)
    report = json.loads((old / "report.json").read_text())
    names = {"learning_rate": "lr", "num_epochs": "num_steps", "activation_cache": "prefix_cache"}
    report["config"] = {names.get(key, key): value for key, value in report["config"].items()}
    assert "lr" in report["config"] and "learning_rate" not in report["config"]
    (old / "report.json").write_text(json.dumps(report))
    settings = read_earlier(old).settings
    assert settings == read_earlier(edit_run).settings and settings["learning_rate"] == 1e-2
    config = load_config(None, ["data_path=new.json", "lr=0.5"], settings)
    assert (config.learning_rate, config.num_epochs, config.batch_size) == (0.5, 60, 5)
    same = config_to_dict(load_config(None, [], read_earlier(edit_run).report["config"]))
    assert finished(old, same)
    with pytest.raises(UserError, match="learning_rate: 0.01 there, 0.5 here"):
        finished(old, same | {"learning_rate": 0.5})

"""The ask command: the project's answers, before and after a delta, and what is refused before loading."""

import io
import json
import subprocess
import sys

import pytest

from locft_jax import prepare
from locft_jax.cli import ask
from locft_jax.cli.command import run_command

MESH = ["--set", "mesh={data: 1, model: 1}"]


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(prepare, "load_opened", load)


@pytest.fixture
def typed(monkeypatch):
    """`typed(bytes)`: what stands on standard input."""
    return lambda raw: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))


def cells(text: str) -> list[list[str]]:
    """Rows of a printed table."""
    rows = [line.strip("┃│").replace("┃", "│").split("│") for line in text.split("\n") if line[:1] in "┃│"]
    return [[cell.strip() for cell in row] for row in rows if len(row) > 1]


@pytest.fixture(scope="module")
def lines(edit_run):
    """What the run itself recorded: {prompt: line} of the probes that the official stop rule ends."""
    text = (edit_run / "predictions.jsonl").read_text(encoding="utf-8")
    every = [json.loads(line) for line in text.split("\n")[:-1]]
    return {line["prompt"]: line for line in every if line["probe"] in ("reliability", "locality")}


def test_the_answers_are_those_of_the_run(edit_run, tiny_model_dir, lines, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "600")
    prompts = list(lines)
    delta = ["--delta", str(edit_run / "delta.safetensors")]
    assert run_command(ask.main, ["--model", str(tiny_model_dir), *delta, *MESH, *prompts]) == 0
    header, *rows = cells(capsys.readouterr().out)
    assert header == ["prompt", "before", "after"]
    shown = [
        [prompt, *(str(ask.plain(lines[prompt][k])).strip() for k in ("before", "after"))]
        for prompt in prompts
    ]
    assert [[" ".join(c.split()) for c in row] for row in rows] == [
        [" ".join(c.split()) for c in r] for r in shown
    ]
    assert ["The sign of Orvik is", "red"] in [[row[0], row[2]] for row in rows]
    assert sum(before != after for _, before, after in rows) > 6


def test_prompts_from_standard_input_and_a_limit(edit_run, typed, capsys):
    model = ["--model", str(edit_run / "hf"), *MESH]
    for arguments in ([], ["-"]):
        typed(b"The sign of Orvik is\r\nThe sign of Mira is\n")
        assert run_command(ask.main, [*model, *arguments]) == 0
        rows = cells(capsys.readouterr().out)
        assert rows[0] == ["prompt", "answer"] and rows[1] == ["The sign of Orvik is", "red"]
        assert [row[0] for row in rows[1:]] == ["The sign of Orvik is", "The sign of Mira is"]
    whole = rows[2][1]
    assert run_command(ask.main, [*model, "--max-tokens", "1", "The sign of Mira is"]) == 0
    first = cells(capsys.readouterr().out)[1][1]
    assert whole.startswith(first) and len(first) < len(whole)


def test_a_prompt_may_hold_an_equals_sign(edit_run, capsys, monkeypatch):
    """Only known keys are overrides, `--set` takes several as it does elsewhere, and `--` ends them."""
    monkeypatch.setenv("COLUMNS", "200")
    overrides = ["--set", "mesh={data: 1, model: 1}", "row_length=64", "2+2=4", "x = five", "seed=1"]
    prompts = ["row_length=3", "--model"]
    assert run_command(ask.main, ["--model", str(edit_run / "hf"), *overrides, "--", *prompts]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows[1:]] == ["2+2=4", "x = five", *prompts]


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["ok", ""], b"", "prompt 2 is empty"),
        (["ok", " \t"], b"", "prompt 2 is empty"),
        ([], b"a\n\nb\n", "line 2 is empty"),
        ([], b"", "no prompts"),
        ([], b"fine\n\xff\xfe\n", "line 2 is not valid UTF-8"),
        (["\udcff"], b"", "prompt 1 is not valid UTF-8"),
        (["five " * 300], b"", "the model's context holds 256; shorten or drop it"),
        (["five " * 245], b"", "the context holds 256: shorten it, or lower --max-tokens"),
        (["five", "--max-tokens", "256"], b"", "up to 256 of its answer; the context holds 256"),
        (["five", "--max-tokens", "0"], b"", "--max-tokens 0: it must be 1 or more"),
        (["five", "--set", "chat_template=true"], b"", "no chat template"),
        (["five", "--set", "lrr=1"], b"", "unknown key `lrr`"),
        (["five", "--set", "five"], b"", "expected key=value"),
        (["five", "--delta", "nowhere"], b"", "nowhere: not a readable delta file"),
    ],
)
def test_wrong_input_is_refused_before_weights_load(
    tiny_model_dir, no_weights, typed, capsys, arguments, text, said
):
    typed(text)
    assert run_command(ask.main, ["--model", str(tiny_model_dir), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_delta_of_another_model_is_refused(
    edit_run, no_weights, make_model, make_tokenizer, tmp_path, capsys
):
    other = make_tokenizer(make_model(tmp_path / "other", seed=9))
    delta = ["--delta", str(edit_run / "delta.safetensors")]
    assert run_command(ask.main, ["--model", str(other), *delta, "five"]) == 2
    assert "is not the model that this delta was made on" in capsys.readouterr().err


def test_it_is_a_command(tmp_path):
    command = [sys.executable, "-m", "locft_jax.ask", "--model", str(tmp_path), "-"]
    done = subprocess.run(command, input=b"a\n", capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"config.json" in done.stderr

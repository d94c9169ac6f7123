"""Command lines: what is an override, what is not, and what is refused before anything slow is imported."""

import subprocess
import sys
import time

import pytest

from locft_jax import __version__
from locft_jax.cli import main
from locft_jax.cli.main import check_early, new_parser, parse_config, parse_words
from locft_jax.config import KEYS
from locft_jax.errors import UserError


def parsed(*words, text=False):
    parser = new_parser("test", "A test.", "word")
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    args = parse_words(parser, words, text)
    return args.pairs, args.rest, args.out, args.resume


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lr=1"], (["lr=1"], [], None, False)),
        (["a.yaml", "lr=1", "--out", "x", "seed=2"], (["lr=1", "seed=2"], ["a.yaml"], "x", False)),
        (["--set", "lr=1", "seed=2", "a.yaml"], (["lr=1", "seed=2"], ["a.yaml"], None, False)),
        (["--set=lr=1", "--resume", "--set", "lr=2"], (["lr=1", "lr=2"], [], None, True)),
        (["--out", "lr=3", "lr=1"], (["lr=1"], [], "lr=3", False)),  # an option's value is no override
        (["layer=[1, 2]", "runs/lr=1/a.yaml"], (["layer=[1, 2]"], ["runs/lr=1/a.yaml"], None, False)),
        (["lr=1", "--", "lr=2", "--out"], (["lr=1"], ["lr=2", "--out"], None, False)),
    ],
)  # fmt: skip
def test_known_keys_are_overrides_until_two_dashes(words, expected):
    assert parsed(*words) == expected


def test_prompts_may_hold_equals_signs():
    words = ["2+2=4", "x=", "let x=5 be", "seed=1", "E=mc^2"]
    assert parsed(*words, text=True)[:2] == (["seed=1"], ["2+2=4", "x=", "let x=5 be", "E=mc^2"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lrr=1"], "command line: unknown key `lrr`; the nearest known key is `learning_rate`"),
        (["--set", "lrr=1"], "unknown key `lrr`"),
        (["--set", "config.yaml"], "--set config.yaml: expected key=value"),
        (["lr=1", "--set"], "--set : expected key=value"),
    ],
)
@pytest.mark.parametrize("check", [lambda words: parsed(*words), lambda words: check_early(words, False)])
def test_what_is_no_override_is_refused(words, says, check):
    with pytest.raises(UserError) as error:
        check(words)
    assert says in str(error.value)


def test_one_config_at_most():
    args = parse_config(new_parser("test", "A test.", "word"), ["a.yaml", "seed=1"])
    assert (args.config, args.pairs) == ("a.yaml", ["seed=1"])
    with pytest.raises(UserError, match="one config file"):
        parse_config(new_parser("test", "A test.", "word"), ["a.yaml", "b.yaml"])


def test_a_config_file_is_looked_at_early(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("lr: fast\n")
    path = str(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="a.yaml: `lr: fast` is not valid"):
        check_early([path], False)
    for words in (["--from", path], ["--coordinator", "a:1", path], ["--", path]):  # a value; for all to say
        check_early(words, False)


def test_help_version_and_keys(capsys):
    for words, status in ((["--help"], 0), (["--version"], 0), ([], 2), (["edits"], 2)):
        with pytest.raises(SystemExit) as end:
            main.main(words)
        assert end.value.code == status
    said = capsys.readouterr()
    assert all(f"\n  {name} " in said.out for name in main.COMMANDS) and __version__ in said.out
    assert "COMMAND" in said.err
    with pytest.raises(SystemExit) as end:
        main.run("edit", ["--help-keys"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n{key}=" in f"\n{said}" for key in KEYS) and "(alias lr)" in said


LOCFT = "import sys; from locft_jax.cli.main import main; sys.exit(main())"


@pytest.mark.parametrize("command", [["-m", "locft_jax.edit"], ["-c", LOCFT, "edit"]])
def test_a_misspelt_key_answers_before_anything_slow_is_imported(command, tmp_path):
    code = "import sys; print({'jax', 'transformers', 'orbax'} & set(sys.modules), file=sys.stderr)"
    (tmp_path / "sitecustomize.py").write_text(f"import atexit\natexit.register(lambda: exec({code!r}))\n")
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command, "lrr=1"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"},
    )
    assert done.returncode == 2 and time.monotonic() - begin < 3
    assert done.stderr.splitlines()[0].startswith("error: command line: unknown key `lrr`")
    assert done.stderr.splitlines()[-1] == "set()" and done.stdout == ""

"""`locft NAME ...`: one program, and what its command lines have in common: one style of help, `key=value`
overrides, checks before slow imports. `python -m locft_jax.NAME ...` is the same."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from locft_jax.config import OVERRIDES, check_keys, key_rows, known_key, unknown_key
from locft_jax.errors import UserError, one_screen
from locft_jax.version import __version__

COMMANDS = {
    "edit": "edit facts into a model, and measure it before and after",
    "evaluate": "measure a model, edited or not",
    "locate": "find where to edit a model",
    "sweep": "edit with many settings and compare",
    "ask": "ask a model, edited or not",
    "delta": "apply, revert, show, diff, merge and compose edits",
    "plan": "whether an edit fits, and how long it takes, before there is a machine",
}
NO_CONFIG, TEXT, OWN_FILE = ("delta",), ("ask",), ("sweep",)  # what is not as with the others
OVERRIDE = re.compile(r"\s*([A-Za-z_]\w*)\s*=")  # a word that may be an override, if its key is one


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser("", "Edit what a language model knows, and undo it.")
    parser.usage = "locft [--help] [--version] COMMAND ..."
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog)
    commands = [f"  {name:8}  {what}" for name, what in COMMANDS.items()]
    parser.epilog = "\n".join(["commands:", *commands, "", "locft COMMAND --help says more."])
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return run(parser.parse_args(argv[:1]).command, argv[1:])


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the command of this name; its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if name not in NO_CONFIG:
            check_early(argv, name in TEXT, name not in OWN_FILE)
    except UserError as e:
        print(one_screen(f"error: {e}"), file=sys.stderr)
        return 2
    command = import_module("locft_jax.cli.command")  # jax and transformers come with these
    return int(command.run_command(import_module(f"locft_jax.cli.{name}").main, argv))


class _HelpKeys(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        for name, alias, default, meaning in key_rows():
            print(f"{name}={default}{f' (alias {alias})' if alias else ''}\n    {meaning}")
        parser.exit()


def new_parser(name: str, doc: str | None, words: str = "") -> argparse.ArgumentParser:
    """The parser of `locft NAME`. `words`: what stands beside its overrides; "": it has no config."""
    parser = argparse.ArgumentParser(prog=f"locft {name}".strip(), description=doc)
    parser.add_argument("--version", action="version", version=f"locft-jax {__version__}")
    if words:
        parser.add_argument("words", nargs="*", metavar=words)
        parser.add_argument("--set", metavar="key=value", help="the same as key=value alone")
        parser.add_argument("--help-keys", action=_HelpKeys, nargs=0, help="every key, and exit")
    return parser


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None, text: bool = False) -> Any:
    """The command line: its overrides are `pairs`, all other words and those after `--` are `rest`."""
    head, tail = _halves(sys.argv[1:] if argv is None else argv)
    args = parser.parse_intermixed_args(head)
    args.pairs, args.rest = split_words(args.words, text)
    args.rest += tail
    return args


def parse_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Any:
    """`parse_words` of a command with at most one other word, its `config`."""
    args = parse_words(parser, argv)
    if len(args.rest) > 1:
        raise UserError(f"{OVERRIDES}: one config file, then key=value; given: {', '.join(args.rest)}")
    args.config = args.rest[0] if args.rest else None
    return args


def split_words(words: Sequence[str], text: bool = False) -> tuple[list[str], list[str]]:
    """(overrides, other words). Raises UserError for an unknown key, unless words are free `text`."""
    pairs: list[str] = []
    rest: list[str] = []
    for word in words:
        found = OVERRIDE.match(word)
        if found and not known_key(found[1]) and not text:
            raise unknown_key(found[1], OVERRIDES)
        (pairs if found and known_key(found[1]) else rest).append(word)
    return pairs, rest


def check_early(argv: Sequence[str], text: bool = False, config: bool = True) -> None:
    """Raise UserError for bad overrides and a bad `config` file, before anything slow is imported."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or "--coordinator" in " ".join(argv):
        return  # one of several processes says so later, to all of them
    head, _ = _halves(argv)
    values = {i + 1 for i, word in enumerate(head) if word.startswith("--") and "=" not in word}
    pairs, rest = split_words([w for i, w in enumerate(head) if i not in values and w[:1] != "-"], text)
    files = [word for word in rest if config and word.endswith((".yaml", ".yml"))]
    check_keys(files[0] if files else None, pairs)


def _halves(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before and behind `--`; without each `--set`, which must stand before an override."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    words = [w for word in argv[:end] for w in (word.split("=", 1) if word[:6] == "--set=" else [word])]
    for flag, word in itertools.pairwise([*words, ""]):
        if flag == "--set" and not split_words([word])[0]:
            raise UserError(f"--set {word}: expected key=value, for example learning_rate=5e-4")
    return [word for word in words if word != "--set"], list(argv[end + 1 :])

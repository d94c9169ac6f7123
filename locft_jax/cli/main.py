"""`locft NAME ...`: one program. `python -m locft_jax.NAME ...` is the same."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from locft_jax.cli.arguments import check_early, new_parser
from locft_jax.errors import UserError, one_screen

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    parser = new_parser("", "Edit what a language model knows, and undo it.")
    parser.usage = "locft [--help] [--version] COMMAND ..."
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog)
    parser.epilog = "\n".join(
        [
            "commands:",
            *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
            "",
            "locft COMMAND --help says more.",
        ]
    )
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

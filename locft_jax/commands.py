"""What all commands share: exit statuses and messages without tracebacks."""

import io
import logging
import os
import sys
from collections.abc import Callable

from locft_jax.errors import UserError


def run_command(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Exit status of a command: 0 done; 2 the user's input is wrong (one message, no traceback);
    1 anything else that can be foreseen (a loss that is not finite, a full disk, Ctrl-C)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is here for tokenizers: no word on torch
    for name in ("absl", "asyncio"):  # orbax's failures come with tracebacks there; ours say what to do
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what a terminal cannot show
    try:
        main(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, MemoryError) as e:
        print(f"failed: {str(e) or type(e).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        print(f"interrupted: {str(e) or 'nothing was written'}", file=sys.stderr)
        return 1
    return 0


def _unraisable(told: "sys.UnraisableHookArgs") -> None:
    """Tensorstore's threads report to orbax even when a failed write (a full disk) has ended its loop."""
    if str(told.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(told)

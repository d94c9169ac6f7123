"""What all commands share: exit statuses and messages without tracebacks."""

import io
import logging
import os
import sys
from collections.abc import Callable

from locft_jax.errors import UserError, one_screen

LESS_MEMORY = "a smaller batch_size or row_length, prefix_cache=off or a larger model axis in mesh needs less"


def run_command(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Exit status of a command: 0 done; 2 the user's input is wrong (one message of at most a screen,
    no traceback); 1 anything else that can be foreseen (a loss that is not finite, a full disk, a
    device without memory left, Ctrl-C)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is here for tokenizers: no word on torch
    for name in (
        "absl",
        "asyncio",
        "gcsfs",
    ):  # orbax's failures come with tracebacks there; ours say what to do
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what a terminal cannot show
    try:
        main(argv)
    except UserError as e:
        print(one_screen(f"error: {e}"), file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, MemoryError) as e:
        print(one_screen(f"failed: {str(e) or type(e).__name__}"), file=sys.stderr)
        return 1
    except RuntimeError as e:  # jax has no type of its own for this
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        reason = str(e).splitlines()[0]
        print(one_screen(f"failed: the device has no memory left ({reason}); {LESS_MEMORY}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        print(one_screen(f"interrupted: {str(e) or 'nothing was written'}"), file=sys.stderr)
        return 1
    return 0


def _unraisable(told: "sys.UnraisableHookArgs") -> None:
    """Tensorstore's threads report to orbax even when a failed write (a full disk) has ended its loop."""
    if str(told.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(told)

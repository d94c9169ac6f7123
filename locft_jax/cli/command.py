"""What all commands share: exit statuses and messages without tracebacks."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable

from locft_jax import distributed
from locft_jax.errors import UserError, one_screen, reason
from locft_jax.logs import log, log_to_terminal

LESS_MEMORY = "a smaller batch_size or row_length, activation_cache=off or a larger model axis needs less"


def run_command(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Exit status of a command: 0 done; 2 wrong input (one message, a screen at most, no traceback); 1 what
    else can be foreseen (a loss that is not finite, a full disk, a process that died, Ctrl-C)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is here for tokenizers: no word on torch
    log_to_terminal()
    sys.unraisablehook = _unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what a terminal cannot show
    try:
        status = _status(main, argv)
    except Exception:
        if not distributed.several():
            raise
        traceback.print_exc()
        status = 1
    if distributed.several():  # it has not left with the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # Python's own end would wait for the others
    return status


def _status(main: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    try:
        main(argv)
        return 0
    except UserError as e:
        return _tell(f"error: {e}", 2, own=not isinstance(e, distributed.Agreed))
    except FloatingPointError as e:
        return _tell(f"failed: {e}", 1)
    except (OSError, MemoryError) as e:
        return _tell(f"failed: {str(e) or type(e).__name__}", 1, own=True)
    except RuntimeError as e:  # jax has no type of its own for these
        if distributed.lost(e):
            return _tell(f"failed: {distributed.LOST} ({reason(e)})", 1, own=True)
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        line = str(e).splitlines()[0]
        return _tell(f"failed: the device has no memory left ({line}); {LESS_MEMORY}", 1, own=True)
    except KeyboardInterrupt as e:
        return _tell(f"interrupted: {str(e) or 'nothing was written'}", 1)


def _tell(text: str, status: int, own: bool = False) -> int:
    """Print a message and give back the status. What is this process's `own` is said in each process."""
    if own or log.isEnabledFor(logging.WARNING):
        print(one_screen(text), file=sys.stderr)
    return status


def _unraisable(told: "sys.UnraisableHookArgs") -> None:
    """Tensorstore's threads report to orbax even when a failed write (a full disk) has ended its loop."""
    if str(told.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(told)

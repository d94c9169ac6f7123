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
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells failures with tracebacks; we do not
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

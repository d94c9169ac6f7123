"""`python -m locft_jax.sweep`: the same program as `locft sweep`."""

import sys

from locft_jax.cli.command import run_command
from locft_jax.cli.sweep import main

if __name__ == "__main__":
    sys.exit(run_command(main))

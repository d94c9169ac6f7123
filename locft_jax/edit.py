"""`python -m locft_jax.edit`: the same program as `locft edit`."""

import sys

from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main

if __name__ == "__main__":
    sys.exit(run_command(main))

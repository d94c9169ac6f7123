"""`python -m locft_jax.delta`: the same program as `locft delta`."""

import sys

from locft_jax.cli.command import run_command
from locft_jax.cli.delta import main

if __name__ == "__main__":
    sys.exit(run_command(main))

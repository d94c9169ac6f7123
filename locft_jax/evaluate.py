"""`python -m locft_jax.evaluate`: the same program as `locft evaluate`."""

import sys

from locft_jax.cli.command import run_command
from locft_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(run_command(main))

"""`python -m locft_jax.plan`: the same program as `locft plan`."""

import sys

from locft_jax.cli.command import run_command
from locft_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(run_command(main))

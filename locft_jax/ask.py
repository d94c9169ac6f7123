"""`python -m locft_jax.ask`: the same program as `locft ask`."""

import sys

from locft_jax.cli.ask import main
from locft_jax.cli.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

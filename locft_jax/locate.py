"""`python -m locft_jax.locate`: the same program as `locft locate`."""

import sys

from locft_jax.cli.command import run_command
from locft_jax.cli.locate import main

if __name__ == "__main__":
    sys.exit(run_command(main))

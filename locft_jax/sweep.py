"""`python -m locft_jax.sweep` is `locft sweep`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("sweep"))

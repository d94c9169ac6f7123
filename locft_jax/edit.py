"""`python -m locft_jax.edit` is `locft edit`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("edit"))

"""`python -m locft_jax.delta` is `locft delta`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("delta"))

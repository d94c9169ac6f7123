"""`python -m locft_jax.ask` is `locft ask`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("ask"))

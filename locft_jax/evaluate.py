"""`python -m locft_jax.evaluate` is `locft evaluate`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("evaluate"))

"""`python -m locft_jax.plan` is `locft plan`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("plan"))

"""`python -m locft_jax.locate` is `locft locate`."""

from locft_jax.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run("locate"))

"""Versions that a result depends on."""

from importlib.metadata import PackageNotFoundError, version

import jax


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {
        "python": ".".join(str(n) for n in __import__("sys").version_info[:3]),
        "backend": jax.default_backend(),
    }
    for name in ("locft-jax", "jax", "jaxlib", "flax", "optax", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

"""LocFT-BF model editing on JAX: config -> prepare -> model -> editing -> evaluation -> results."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from locft_jax.version import __version__

__all__ = ["CausalLM", "Config", "UserError", "__version__", "apply_delta", "edit", "evaluate", "load_model"]

if TYPE_CHECKING:
    from locft_jax.api import apply_delta, edit, evaluate
    from locft_jax.config import Config
    from locft_jax.errors import UserError
    from locft_jax.io.hf_load import load_model
    from locft_jax.model.nnx import CausalLM

_HOMES = dict.fromkeys(("apply_delta", "edit", "evaluate"), "api") | {"load_model": "io.hf_load"}
_HOMES |= {"Config": "config", "UserError": "errors", "CausalLM": "model.nnx"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import locft_jax` alone loads neither jax nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""locft_jax: LocFT-BF model editing on JAX, in data-flow order.

config.py      what a run is
files.py       files and folders that appear whole or not at all
hosts.py       one run in several processes
remote.py      files and folders at a URL (gs://...)
data/          requests.py (any file -> EditRequest)   streaming.py (edits that arrive over time)
               tokens.py (texts -> packed batches)
model/         spec.py   weights.py (the weight table)   quantize.py (int8 frozen weights)   decoder.py
               sharding.py   memory.py (does it fit?)
               headers.py (what is wrong with a file)   reading.py (parts of tensors)
               hf.py (load, save)
               delta.py (edited tensors, new and old)   combine.py (merge, compose, measure deltas)
editing/       site.py   step.py   prefix.py   pipeline.py
               retained.py (other texts, to be left alone)   moments.py   moments_cache.py   preserve.py
               keep.py
               checkpoint.py (stop and resume)
               run.py (one edit)
evaluation/    generate.py   answers.py   metrics.py   run.py   report.py
planning/      topology.py (machines that are not here)   case.py (which edit)   cost.py (arithmetic)
               programs.py (the compiled ones, abstract)   fit.py (does it fit?)   report.py
card.py        the model card of an edit
export.py      orbax, and where results may go
api.py         load_model, edit, evaluate: the commands as functions
locating/      places.py (which sites)   rule.py (which is best)   measure.py (edit and ask at each)
               table.py   figure.py   compiled.py
sweeping/      grid.py (sweep file -> runs)   table.py   figure.py   frontier.py (what preserves best)
edit.py  evaluate.py  locate.py  sweep.py  plan.py  delta.py  ask.py   `python -m locft_jax.NAME`
demo/          a small world of facts, its generator, and the small model that knows them

A room imports only rooms above it; commands import all of them.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CausalLM", "Config", "UserError", "edit", "evaluate", "load_model"]

if TYPE_CHECKING:
    from locft_jax.api import edit, evaluate
    from locft_jax.config import Config
    from locft_jax.errors import UserError
    from locft_jax.model.hf import load_model
    from locft_jax.model.nnx import CausalLM

_HOMES = {
    "edit": "api",
    "evaluate": "api",
    "load_model": "model.hf",
    "Config": "config",
    "UserError": "errors",
    "CausalLM": "model.nnx",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import locft_jax` alone loads neither jax nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`locft_jax.edit` stays the function when the command's module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

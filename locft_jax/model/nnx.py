"""`CausalLM`: the same weights and the same forward as a `flax.nnx.Module`, for Flax code."""

import jax
from flax import nnx

from locft_jax.model import decoder
from locft_jax.model.model import Model
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Params, Weights


class CausalLM(nnx.Module):
    """`CausalLM(model)(tokens)` -> logits. `nnx.state(module, nnx.Param)` holds the frozen weights by table
    key (layers stacked [L, out, in]; a Quantized where they are int8) and, under `overrides`, the edited
    matrices by HF name; `nnx.jit` works as usual."""

    def __init__(self, model: Model) -> None:
        self.spec: ModelSpec = model.spec
        self.weights = nnx.Dict({k: nnx.Param(a) for k, a in model.weights.items()})
        self.overrides = nnx.Dict({k: nnx.Param(a) for k, a in model.overrides.items()})

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] -> logits [B, T, V] float32."""
        weights: Weights = {k: p.get_value() for k, p in self.weights.items()}
        overrides = {k: p[...] for k, p in self.overrides.items()}
        return decoder.logits(Params(self.spec, weights, overrides), tokens)

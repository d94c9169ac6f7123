"""`Model`: parameters, mesh and tokenizer of one loaded model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from locft_jax.io.delta import Delta, check_delta
from locft_jax.io.hf_folder import HFFolder
from locft_jax.model.sharding import place, tensor_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Params, Quantized, Weights, locate_tensor


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: frozen weights on a mesh, overrides (none at first), and the folder it came from."""

    params: Params
    mesh: Mesh
    tokenizer: Any
    folder: HFFolder

    @property
    def spec(self) -> ModelSpec:
        return self.params.spec

    @property
    def weights(self) -> Weights:
        return self.params.weights

    @property
    def overrides(self) -> Overrides:
        """HF name -> matrix in the weights' dtype."""
        return self.params.overrides

    @property
    def eos(self) -> tuple[int, ...]:
        """All ids that end an answer: config's, generation_config's and the tokenizer's."""
        own = () if self.tokenizer.eos_token_id is None else (int(self.tokenizer.eos_token_id),)
        return tuple(sorted({*self.folder.eos, *own}))

    @property
    def dtype(self) -> Any:
        """dtype of the activations, the edits, and the frozen weights unless those are int8."""
        return self.params.dtype

    @property
    def int8(self) -> bool:
        """Whether the frozen matrices are int8."""
        return isinstance(self.weights["embed"], Quantized)

    def with_overrides(self, tensors: Mapping[str, np.ndarray | jax.Array], dtype: Any = None) -> "Model":
        """The same model with `tensors` (HF names and layout) in place of its own, in `dtype` (default:
        that of the weights); nothing is copied. What the checkpoint holds but no forward reads is left out.
        Raises KeyError for any other name."""
        placed = {}
        for name, value in tensors.items():
            try:
                row, _ = locate_tensor(self.spec, name)
            except KeyError:
                if name not in self.folder.tensors:
                    raise
                continue
            sharding = tensor_sharding(self.mesh, self.spec, row, stacked=False)
            placed[name] = place(value.astype(dtype or self.dtype), sharding)
        return dataclasses.replace(self, params=self.params.over({**self.overrides, **placed}))

    def apply(self, delta: Delta) -> "Model":
        """With a delta's tensors in place. Raises UserError if it was not made on this checkpoint."""
        check_delta(self.folder, delta)
        return self.with_overrides(delta.new)

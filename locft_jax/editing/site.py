"""The site: which tensors are tuned, how they are found, read and put into the model. `theta` is what is
trained, the overrides are what the model computes with; for LocFT-BF they are the same."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.errors import UserError
from locft_jax.model.sharding import place, tensor_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Params, locate_tensor, take_tensor, weight_table

Theta = dict[str, jax.Array]  # HF tensor name -> float32 master


def find_site(spec: ModelSpec, modules: Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
    """HF names of the tensors that `modules` (templates with `{}` for the layer) select in `layers`.

    A template matches whole path components anywhere in a name: `model.layers.{}.mlp.down_proj.weight` is one
    matrix, `layers.{}.self_attn` a whole attention, `model.layers.{}` an entire layer. (The reference matches
    substrings, by which layer 2 also frees layers 20-29.) Raises UserError for a layer out of range or a
    template that selects nothing, listing what exists."""
    beyond = [l for l in layers if not 0 <= l < spec.n_layers]
    if beyond:
        raise UserError(f"layer: {beyond[0]} is out of range; this model has layers 0 to {spec.n_layers - 1}")
    rows = weight_table(spec).values()
    names = [n for row in rows for l, n in enumerate(row.names()) if not row.layers or l in layers]
    found: set[str] = set()
    for module in modules:
        wanted = [module.replace("{}", str(l)) for l in layers] if "{}" in module else [module]
        hits = [name for name in names if any(_holds(name, w) for w in wanted)]
        if not hits:
            what = f"{module!r} matches no tensor of this model; whole path components are compared"
            known = "\n  ".join(row.hf for row in rows)
            raise UserError(f"rewrite_module: {what}. The model's tensors:\n  {known}")
        found.update(hits)
    return tuple(sorted(found, key=lambda n: _order(spec, n)))


def _holds(name: str, pattern: str) -> bool:
    """Whether the components of `pattern` follow each other in `name`."""
    have, want = name.split("."), pattern.strip(".").split(".")
    return any(have[i : i + len(want)] == want for i in range(len(have) - len(want) + 1))


def _order(spec: ModelSpec, name: str) -> tuple[int, int]:
    row, layer = locate_tensor(spec, name)
    return (-1 if layer is None else layer), list(weight_table(spec)).index(row.key)


def first_layer(spec: ModelSpec, site: Sequence[str]) -> int:
    """The lowest layer that an edit of `site` can change: activations entering it are constant. The embedding
    counts as layer 0, the final norm and head as the last layer."""
    located = (locate_tensor(spec, name) for name in site)
    return min(l if l is not None else 0 if row.key == "embed" else spec.n_layers - 1 for row, l in located)


def read_site(
    params: Params, site: Sequence[str], mesh: Mesh, start: Mapping[str, jax.Array | np.ndarray]
) -> Theta:
    """The site's tensors (of `start`, else the model's) as float32 masters, sharded by the weight table."""
    theta = {}
    for name in site:
        row, _ = locate_tensor(params.spec, name)
        own = start[name] if name in start else take_tensor(params, name)
        # A copy, as it will be donated; what is on the host must not pass through one device.
        value = np.array(own, np.float32) if isinstance(own, np.ndarray) else jnp.array(own, jnp.float32)
        theta[name] = place(value, tensor_sharding(mesh, params.spec, row, stacked=False))
    return theta


def materialize(theta: Theta, base: Overrides) -> dict[str, jax.Array]:
    """What is trained -> the model's overrides: for LocFT-BF theta itself, over those that it carries."""
    return {**base, **theta}


def parameters(theta: Theta) -> int:
    """Number of tuned parameters."""
    return sum(int(a.size) for a in theta.values())

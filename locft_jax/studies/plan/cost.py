"""What a program costs by the model's own arithmetic: FLOPs, bytes read, bytes sent, a bound on its time.

Letters as in decoder.py. A matrix of p elements costs 2 p FLOPs a token forward, 2 p more for the gradient
of its input, and 2 p for its own. Every layer of a mesh with a `model` axis adds up two partial sums of the
residual stream forward and two backward.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import locate_tensor, weight_table
from locft_jax.studies.plan.topology import Chip


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of a program. FLOPs of all chips together; bytes of one chip."""

    flops: float
    read: float  # from its memory: the weights, each time that the program goes through them
    sent: float  # to other chips

    def bound(self, chip: Chip, chips: int) -> tuple[float, str] | None:
        """(seconds that it takes at least, what limits it: `compute`, `memory` or `links`), None for a chip
        whose rates are not known. Each alone at its peak rate, all of them at once."""
        if chip.flops is None or chip.bandwidth is None or chip.links is None:
            return None
        times = {
            "compute": self.flops / (chips * chip.flops),
            "memory": self.read / chip.bandwidth,
            "links": self.sent / chip.links,
        }
        limit = max(times, key=lambda k: times[k])
        return times[limit], limit


def layer_matrices(spec: ModelSpec) -> tuple[int, int]:
    """Elements of one layer's matrices: (key and value, the rest)."""
    rows = [r for r in weight_table(spec).values() if r.layers and len(r.shape) == 2]
    sizes = {r.key: math.prod(r.shape) for r in rows}
    keys_values = sizes["k"] + sizes["v"]
    return keys_values, sum(sizes.values()) - keys_values


@dataclasses.dataclass(frozen=True)
class Size:
    """What a program computes on: slots of its packed rows, length of a row, positions whose logits it needs;
    bytes of an activation."""

    tokens: int
    length: int
    targets: int
    itemsize: int


def train_work(
    spec: ModelSpec,
    mesh: Mapping[str, int],
    site: Sequence[str],
    first: int,
    size: Size,
    weights: int,
    tuned: int,
) -> Work:
    """One step with activations entering layer `first`: forward, input gradients above the site, the site's
    own gradients; the last block's query, output and MLP and the head at targets only. `weights`, `tuned`:
    bytes of them on a chip."""
    keys_values, rest = layer_matrices(spec)
    scores = 2 * spec.n_heads * spec.head_dim * size.length  # query x key and weights x value, a token
    layers = spec.n_layers - first
    lowest = 2 * size.tokens * (keys_values + rest + scores) if layers > 1 else 0
    between = 4 * max(0, layers - 2) * size.tokens * (keys_values + rest + scores)
    last = 4 * (size.tokens * keys_values + size.targets * (rest + scores))
    head = 4 * size.targets * spec.vocab_size * spec.d_model
    gradients = 2 * size.tokens * sum(math.prod(locate_tensor(spec, name)[0].shape) for name in site)
    return Work(
        flops=lowest + between + last + head + gradients,
        read=2 * weights * layers / spec.n_layers + 2 * tuned,
        # Gradients are a third of the tuned state: it holds the master and two moments.
        sent=_sums(spec, mesh, 4 * layers, size) + 2 * (mesh["data"] - 1) / mesh["data"] * tuned / 3,
    )


def forward_work(
    spec: ModelSpec, mesh: Mapping[str, int], layers: int, size: Size, weights: int, cache: int = 0
) -> Work:
    """`layers` whole layers forward, and the head at the targets. `weights`: bytes of them on a chip,
    `cache`: of the keys and values that are read."""
    scores = 2 * spec.n_heads * spec.head_dim * size.length
    each = 2 * size.tokens * (sum(layer_matrices(spec)) + scores)
    return Work(
        flops=layers * each + 2 * size.targets * spec.vocab_size * spec.d_model,
        read=weights * layers / spec.n_layers + cache,
        sent=_sums(spec, mesh, 2 * layers, size),
    )


def _sums(spec: ModelSpec, mesh: Mapping[str, int], count: int, size: Size) -> float:
    """Bytes that a chip sends to add up `count` partial sums of the residual stream over the `model` axis:
    each a reduce-scatter and an all-gather around a ring."""
    ring = 2 * (mesh["model"] - 1) / mesh["model"]
    return count * ring * math.ceil(size.tokens / mesh["data"]) * spec.d_model * size.itemsize

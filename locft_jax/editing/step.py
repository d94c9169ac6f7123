"""One edit step: loss, optimizer, `EditState`, `train_step`. Pure and jitted.

Only the site's leaves are differentiated, so no gradient, moment or output of the frozen weights'
size exists; the frozen weights are an argument of their own that is only read.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from locft_jax.data.packing import Batch
from locft_jax.editing.site import Theta, materialize
from locft_jax.model import decoder
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights, take_tensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The symmetric matrix I - basis diag(damp) basis^T [n, n], basis orthonormal."""

    basis: Any  # [n, k] float32
    damp: Any  # [k] float32


Side = jax.Array | LowRank
Sides = tuple[Side, Side | None]  # P_in [in, in], P_out [out, out]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EditState:
    """What changes during an edit; donated to every step."""

    theta: Theta  # float32 masters
    optimizer: Any  # Adam's count and moments, float32, of theta's shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
    """Scalars of the optimizer (traced: another rate compiles nothing new)."""

    lr: float
    weight_decay: float
    loss_floor: float
    norm_constraint: float | None = None  # no element moves further than this from the base (FT-L)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """A mini-batch of retained texts, and what the base model expects at its M targets: the K likeliest
    tokens and all others together (editing/keep.py)."""

    source: jax.Array  # as the edits' own: token ids [total], or activations [total, D]
    batch: Batch  # `labels` are not read
    ids: Any  # [M, K] int32
    logp: Any  # [M, K] float32, log-probabilities
    rest: Any  # [M] float32, log of the probability of all others
    strength: Any  # of the divergence in the loss


def precondition(preserve: Mapping[str, Sides]) -> optax.GradientTransformation:
    """Updates U [out, in] -> P_out U P_in for the tensors that have such matrices (editing/preserve.py); the
    others stay as they are. No state; with nothing in `preserve` no operation."""
    product = functools.partial(jnp.einsum, "ab,bc->ac", precision=jax.lax.Precision.HIGHEST)

    def times(u: jax.Array, p: Side) -> jax.Array:
        if isinstance(p, LowRank):
            return u - product(product(u, p.basis) * p.damp, p.basis.T)
        return product(u, p)

    def update(updates: Theta, params: Theta | None = None) -> Theta:
        found = dict(updates)
        for name in updates.keys() & preserve.keys():
            inner, outer = preserve[name]
            found[name] = times(found[name], inner)
            found[name] = found[name] if outer is None else times(found[name].T, outer).T
        return found

    return optax.stateless(update)


def make_optimizer(
    hyper: Hyper,
    preserve: Mapping[str, Sides] = {},  # noqa: B006 (never written to)
) -> optax.GradientTransformationExtraArgs:
    """torch.optim.Adam (0.9, 0.999, 1e-8) with L2 weight decay in the gradient, at a constant
    rate; a batch with loss below the floor moves neither the weights nor Adam's moments and count
    (method.md, Training). `preserve`: the matrices that updates are multiplied with, after Adam."""
    adam = optax.chain(
        optax.add_decayed_weights(hyper.weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        precondition(preserve),
        optax.scale_by_learning_rate(hyper.lr),
    )
    # A NaN compares False: it makes no step either, and the loop reports it as the error it is.
    return optax.conditionally_mask(
        adam, lambda step, *, loss: loss >= hyper.loss_floor, forward_extra_args=True
    )


def init_state(theta: Theta) -> EditState:
    """State before the first step. Moments inherit theta's shardings."""
    return EditState(theta, make_optimizer(Hyper(0.0, 0.0, 0.0)).init(theta))


def enter(spec: ModelSpec, weights: Weights, edits: Overrides, source: jax.Array, index: jax.Array) -> jax.Array:
    """The residual stream [B, T, D] of a packed batch at the layer where `source` stands: token ids
    [total] are embedded (layer 0), cached activations [total, D] are looked up."""
    return decoder.embed(spec, weights, edits, source[index]) if source.ndim == 1 else source[index]


def target_logits(
    spec: ModelSpec, start: int, weights: Weights, edits: Overrides, source: jax.Array, batch: Batch
) -> jax.Array:
    """Logits [M, V] float32 at the batch's targets; `source` enters layer `start`."""
    x = enter(spec, weights, edits, source, batch.index)
    x = decoder.hidden_at_targets(spec, weights, edits, x, batch.rows, batch.targets, start)
    return decoder.head(spec, weights, edits, x)


def batch_loss(
    spec: ModelSpec,
    start: int,
    theta: Theta,
    weights: Weights,
    base: Overrides,
    source: jax.Array,
    batch: Batch,
) -> jax.Array:
    """Cross-entropy over target tokens, averaged by the batch's weights: FT-M (scalar, nats)."""
    scores = target_logits(spec, start, weights, materialize(theta, base), source, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
    return jnp.sum(losses * batch.weight)


def divergence(scores: jax.Array, kept: Kept) -> jax.Array:
    """KL(base || model) in nats, averaged by the batch's weights, of the model's logits [M, V]: exact for the
    K tokens that are kept, all others count as one, so that it is never more than the whole one."""
    at = jnp.arange(len(scores))[:, None]
    total = jax.nn.logsumexp(scores, axis=-1)
    # 1 - sum would lose a small remainder: the others are added up themselves.
    others = jax.nn.logsumexp(scores.at[at, kept.ids].set(-jnp.inf), axis=-1) - total
    each = jnp.sum(jnp.exp(kept.logp) * (kept.logp - (scores[at, kept.ids] - total[:, None])), axis=-1)
    return jnp.sum(kept.batch.weight * (each + jnp.exp(kept.rest) * (kept.rest - others)))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def train_step(
    spec: ModelSpec,
    start: int,
    hyper: Hyper,
    state: EditState,
    weights: Weights,
    base: Overrides,
    source: jax.Array,
    batch: Batch,
    preserve: Mapping[str, Sides] = {},  # noqa: B006 (never written to)
    kept: Kept | None = None,
) -> tuple[EditState, jax.Array]:
    """One step on one packed batch: (state, frozen weights, inputs) -> (state, loss). With `kept` the
    gradient is that of loss + strength x divergence; the loss, and all that looks at it, stays the edits'."""

    def objective(theta: Theta) -> tuple[jax.Array, jax.Array]:
        loss = batch_loss(spec, start, theta, weights, base, source, batch)
        if kept is None:
            return loss, loss
        scores = target_logits(spec, start, weights, materialize(theta, base), kept.source, kept.batch)
        return loss + kept.strength * divergence(scores, kept), loss

    (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(state.theta)
    updates, optimizer = make_optimizer(hyper, preserve).update(
        grads, state.optimizer, state.theta, loss=loss
    )
    theta = optax.apply_updates(state.theta, updates)
    return EditState(bounded(spec, theta, weights, base, hyper.norm_constraint), optimizer), loss


def bounded(spec: ModelSpec, theta: Theta, weights: Weights, base: Overrides, bound: float | None) -> Theta:
    """theta clipped to what stands in the model (`base` first: edits, and what it holds as int8) +- `bound`;
    None: as it is."""
    if bound is None:
        return theta
    own = {n: jnp.float32(base[n] if n in base else take_tensor(spec, weights, n)) for n in theta}
    return {n: jnp.clip(a, own[n] - bound, own[n] + bound) for n, a in theta.items()}

"""One edit step: loss, optimizer, `EditState`, `train_step`; pure and jitted. Only the site's leaves are
differentiated, so no gradient, moment or output of the frozen weights' size exists."""

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
from locft_jax.model.activation_cache import Inputs
from locft_jax.model.weights import Params, take_tensor


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

    learning_rate: float
    weight_decay: float
    loss_floor: float
    norm_constraint: float | None = None  # no element moves further than this from the base (FT-L)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetainBatch:
    """A mini-batch of retained texts, and what the base model expects at its M targets."""

    inputs: Inputs
    batch: Batch  # `labels` are not read
    ids: Any  # [M, K] int32, the K likeliest tokens
    logp: Any  # [M, K] float32, log-probabilities
    rest: Any  # [M] float32, log of the probability of all others
    strength: Any  # of the divergence in the loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regularizers:
    """What limits a step on retained texts; by default nothing."""

    preconditioner: Mapping[str, Sides] = dataclasses.field(default_factory=dict)  # HF name -> matrices
    retain: RetainBatch | None = None


def precondition(sides: Mapping[str, Sides]) -> optax.GradientTransformation:
    """Updates U [out, in] -> P_out U P_in for the tensors that have such matrices. No state; without matrices
    no operation."""
    product = functools.partial(jnp.einsum, "ab,bc->ac", precision=jax.lax.Precision.HIGHEST)

    def times(u: jax.Array, p: Side) -> jax.Array:
        if isinstance(p, LowRank):
            return u - product(product(u, p.basis) * p.damp, p.basis.T)
        return product(u, p)

    def both(u: jax.Array, inner: Side, outer: Side | None) -> jax.Array:
        u = times(u, inner)
        return u if outer is None else times(u.T, outer).T

    return optax.stateless(lambda u, _: {n: both(a, *sides[n]) if n in sides else a for n, a in u.items()})


def make_optimizer(hyper: Hyper, sides: Mapping[str, Sides]) -> optax.GradientTransformationExtraArgs:
    """torch.optim.Adam (0.9, 0.999, 1e-8) with L2 weight decay in the gradient, at a constant rate, and
    `precondition`; a loss below the floor moves neither the weights nor Adam's moments and count."""
    adam = optax.chain(
        optax.add_decayed_weights(hyper.weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        precondition(sides),
        optax.scale_by_learning_rate(hyper.learning_rate),
    )
    # A NaN compares False: it makes no step either, and the loop reports it as the error it is.
    learns = lambda step, *, loss: loss >= hyper.loss_floor  # noqa: E731
    return optax.conditionally_mask(adam, learns, forward_extra_args=True)


def init_state(theta: Theta) -> EditState:
    """State before the first step. Moments inherit theta's shardings."""
    return EditState(theta, make_optimizer(Hyper(0.0, 0.0, 0.0), {}).init(theta))


def target_logits(params: Params, inputs: Inputs, batch: Batch) -> jax.Array:
    """Logits [M, V] float32 at the batch's targets."""
    x = inputs.enter(params, batch.index)
    return decoder.head(params, decoder.hidden_at_targets(params, x, batch.rows, batch.targets, inputs.layer))


def batch_loss(theta: Theta, params: Params, inputs: Inputs, batch: Batch) -> jax.Array:
    """Cross-entropy over target tokens, averaged by the batch's weights: FT-M (scalar, nats)."""
    scores = target_logits(params.over(materialize(theta, params.overrides)), inputs, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
    return jnp.sum(losses * batch.weight)


def divergence(scores: jax.Array, retain: RetainBatch) -> jax.Array:
    """KL(base || model) in nats, averaged by the batch's weights, of the model's logits [M, V]: exact for the
    K tokens that are stored; all others count as one, so that it is never more than the whole one."""
    at = jnp.arange(len(scores))[:, None]
    total = jax.nn.logsumexp(scores, axis=-1)
    # 1 - sum would lose a small remainder: the others are added up themselves.
    others = jax.nn.logsumexp(scores.at[at, retain.ids].set(-jnp.inf), axis=-1) - total
    each = jnp.sum(jnp.exp(retain.logp) * (retain.logp - (scores[at, retain.ids] - total[:, None])), axis=-1)
    return jnp.sum(retain.batch.weight * (each + jnp.exp(retain.rest) * (retain.rest - others)))


@functools.partial(jax.jit, donate_argnums=1)
def train_step(
    hyper: Hyper, state: EditState, params: Params, inputs: Inputs, batch: Batch, regularizers: Regularizers
) -> tuple[EditState, jax.Array]:
    """One step on one packed batch -> (state, loss). With a retain batch the gradient is that of loss +
    strength x divergence; the loss, and all that looks at it, stays the edits'."""

    def objective(theta: Theta) -> tuple[jax.Array, jax.Array]:
        loss, retain = batch_loss(theta, params, inputs, batch), regularizers.retain
        if retain is None:
            return loss, loss
        edited = params.over(materialize(theta, params.overrides))
        scores = target_logits(edited, retain.inputs, retain.batch)
        return loss + retain.strength * divergence(scores, retain), loss

    (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(state.theta)
    optimizer = make_optimizer(hyper, regularizers.preconditioner)
    updates, moments = optimizer.update(grads, state.optimizer, state.theta, loss=loss)
    theta, bound, base = optax.apply_updates(state.theta, updates), hyper.norm_constraint, params.overrides
    if bound is not None:  # around the model's own values
        own = {n: jnp.float32(base[n] if n in base else take_tensor(params, n)) for n in theta}
        theta = {n: jnp.clip(a, own[n] - bound, own[n] + bound) for n, a in theta.items()}
    return EditState(theta, moments), loss

"""The edit step against a plain torch loop that follows the reference, and what it costs in memory."""

import copy
import dataclasses
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from families import make_family  # noqa: E402

from locft_jax.data.packing import (  # noqa: E402
    Batch,
    Corpus,
    Rows,
    Shape,
    Targets,
    corpus_from_lists,
    epoch_batches,
    fit_shape,
)
from locft_jax.editing.site import find_site, first_layer, read_site  # noqa: E402
from locft_jax.editing.step import (  # noqa: E402
    EditState,
    Hyper,
    Regularizers,
    batch_loss,
    init_state,
    make_optimizer,
    train_step,
)
from locft_jax.editing.trainer import Job, Schedule, train  # noqa: E402
from locft_jax.io import hf_folder, hf_load  # noqa: E402
from locft_jax.model.activation_cache import Inputs, cached_source  # noqa: E402
from locft_jax.model.sharding import make_mesh  # noqa: E402
from locft_jax.model.spec import parse_spec  # noqa: E402
from locft_jax.model.weights import Params, abstract_weights  # noqa: E402

LAYERS, EXAMPLES, BATCH = 4, 23, 8  # 23 = 8 + 8 + 7: the last batch of every epoch is short


@dataclass(frozen=True)
class Run:
    """What a loop did, ours or torch's."""

    losses: list[float]
    skipped: list[bool]
    epochs: list[float]
    stopped: str
    tensors: dict[str, np.ndarray]
    adam: dict[str, tuple[np.ndarray, np.ndarray]]  # first and second moments of each tensor
    count: int


@dataclass(frozen=True)
class World:
    model: Any  # the torch model
    params: Params
    mesh: jax.sharding.Mesh
    corpus: Corpus
    shape: Shape


@pytest.fixture(scope="module")
def world(torch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = make_family("llama", folder, num_hidden_layers=LAYERS)
    opened = hf_folder.open_folder(str(folder))
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 96, rng.integers(6, 15)) for _ in range(EXAMPLES)]
    corpus = corpus_from_lists(parts, [len(p) - rng.integers(1, 6) for p in parts])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is faster without others
    batches = [b for e in range(60) for b in epoch_batches(EXAMPLES, BATCH, 0, e)]
    shape = fit_shape(corpus, batches, 32)  # one for all cases: they share what is compiled
    yield World(model, Params(opened.spec, hf_load.load_weights(opened, mesh)), mesh, corpus, shape)
    torch.set_num_threads(threads)


def run_ours(world, site, schedule, mode):
    params = world.params
    layer = first_layer(params.spec, site) if mode != "off" else 0
    source = cached_source(params, world.corpus, layer, mode, world.mesh, 32)
    job = Job(params, world.mesh, world.corpus, source, schedule, shape=world.shape)
    out = train(job, init_state(read_site(params, site, world.mesh, {})))
    adam = next(s for s in jax.tree.leaves(out.state.optimizer, is_leaf=is_adam) if is_adam(s))
    return Run(
        [r.loss for r in out.records],
        [r.skipped for r in out.records],
        out.epoch_losses,
        out.stopped,
        {name: np.asarray(a) for name, a in out.state.theta.items()},
        {name: (np.asarray(adam.mu[name]), np.asarray(adam.nu[name])) for name in site},
        int(adam.count),
    )


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def run_torch(torch, world, site, schedule):
    """The reference's loop: padded batches, full logits, every layer, torch.optim.Adam on the site."""
    model = copy.deepcopy(world.model)
    tuned = {name: p for name, p in model.named_parameters() if name in site}
    for p in model.parameters():
        p.requires_grad_(False)
    for p in tuned.values():
        p.requires_grad_(True)
    hyper, corpus = schedule.hyper, world.corpus
    adam = torch.optim.Adam(tuned.values(), lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    if schedule.pipeline == "depth":
        return run_torch_depth(torch, world, model, tuned, schedule)
    losses, skipped, epochs, stopped = [], [], [], "epochs"
    for epoch in range(schedule.epochs):
        total = 0.0
        for which in epoch_batches(len(corpus), schedule.batch_size, schedule.seed, epoch):
            loss = torch_loss(torch, model, corpus, which, schedule.average)
            losses.append(loss.item())
            skipped.append(loss.item() < hyper.loss_floor)
            total += loss.item() * len(which)
            if not skipped[-1]:
                adam.zero_grad()
                loss.backward()
                adam.step()
        epochs.append(total / len(corpus))
        if epochs[-1] < hyper.loss_floor:
            stopped = "loss_floor"
            break
    moments = {name: adam.state[p] for name, p in tuned.items()}
    return Run(
        losses,
        skipped,
        epochs,
        stopped,
        {name: p.detach().numpy() for name, p in tuned.items()},
        {name: (m["exp_avg"].numpy(), m["exp_avg_sq"].numpy()) for name, m in moments.items()},
        int(next(iter(moments.values()))["step"]),
    )


def torch_loss(torch, model, corpus, which, average):
    longest = corpus.lengths[which].max()
    ids = torch.zeros((len(which), longest), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for j, i in enumerate(which):
        text = torch.tensor(corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]])
        ids[j, : len(text)], mask[j, : len(text)] = text.long(), 1
        labels[j, corpus.target_start[i] : len(text)] = text[corpus.target_start[i] :].long()
    logits = model(ids, attention_mask=mask).logits[:, :-1].transpose(1, 2)
    nats = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")
    of = (labels[:, 1:] != -100).float()
    by_example = ((nats * of).sum(1) / of.sum(1)).mean()
    return by_example if average == "example" else (nats * of).sum() / of.sum()


def run_torch_depth(torch, world, model, tuned, schedule):
    """The field's usual loop: a fresh Adam for every mini-batch, steps on it until its loss is below the
    floor; after each step the tensors are clipped around what they were before the run."""
    hyper, corpus = schedule.hyper, world.corpus
    first = {name: p.detach().clone() for name, p in tuned.items()}
    losses, skipped, last = [], [], []
    for start in range(0, len(corpus), schedule.batch_size):
        adam = torch.optim.Adam(tuned.values(), lr=hyper.learning_rate)
        which = np.arange(start, min(start + schedule.batch_size, len(corpus)))
        for _ in range(schedule.epochs):
            loss = torch_loss(torch, model, corpus, which, schedule.average)
            losses.append(loss.item())
            skipped.append(loss.item() < hyper.loss_floor)
            if skipped[-1]:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            if hyper.norm_constraint is not None:
                for name, p in tuned.items():
                    low, high = first[name] - hyper.norm_constraint, first[name] + hyper.norm_constraint
                    p.data = torch.minimum(torch.maximum(p.data, low), high)
        last.append(losses[-1])
    moments = {name: adam.state[p] for name, p in tuned.items()}
    return Run(
        losses,
        skipped,
        last,
        "loss_floor" if max(last) < hyper.loss_floor else "epochs",
        {name: p.detach().numpy() for name, p in tuned.items()},
        {name: (m["exp_avg"].numpy(), m["exp_avg_sq"].numpy()) for name, m in moments.items()},
        int(next(iter(moments.values()))["step"]),
    )


def distance(ours, theirs, base=0.0):
    """Norm of the difference as a share of the norm of their move from `base`."""
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - base)


def compare(
    torch, world, modules, layer, mode="off", average="example", epochs=7, pipeline="breadth", **hyper
):
    """Run both loops and hold every figure of one against the other's; theirs is returned."""
    hyper = Hyper(**{"learning_rate": 1e-2, "weight_decay": 0.0, "loss_floor": 1e-2, **hyper})
    schedule = Schedule(BATCH, epochs, 0, average, 32, hyper, pipeline)
    site = find_site(world.params.spec, modules, [layer])
    ours = run_ours(world, site, schedule, mode)
    theirs = run_torch(torch, world, site, schedule)
    # No loss lies so near the floor that rounding decides; else the case says nothing.
    assert min(abs(x / hyper.loss_floor - 1) for x in theirs.losses + theirs.epochs) > 1e-3
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4)
    np.testing.assert_allclose(ours.epochs, theirs.epochs, rtol=1e-4)
    assert (ours.skipped, ours.stopped, ours.count) == (theirs.skipped, theirs.stopped, theirs.count)
    if pipeline == "breadth":  # depth-first, Adam's count is that of the last mini-batch
        assert ours.count == ours.skipped.count(False)
    assert ours.count > 0
    start = dict(world.model.named_parameters())
    for name in site:
        base = start[name].detach().numpy()
        assert distance(ours.tensors[name], theirs.tensors[name], base) <= 1e-3, name
        for mine, yours in zip(ours.adam[name], theirs.adam[name], strict=True):
            assert distance(mine, yours) <= 1e-3, name
    assert len(theirs.losses) >= 15
    return theirs


DOWN = ["model.layers.{}.mlp.down_proj.weight"]
LAYER = ["model.layers.{}"]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("modules", "layer", "mode"), [(DOWN, 0, "off"), (LAYER, 1, "off"), (DOWN, 3, "device")]
)
def test_edit_of_the_first_an_inner_and_the_last_layer(torch, world, modules, layer, mode):
    theirs = compare(torch, world, modules, layer, mode)
    assert theirs.losses[-1] < 0.9 * theirs.losses[0]  # something was learned


@pytest.mark.parity
def test_weight_decay_is_l2_inside_adam(torch, world):
    plain = compare(torch, world, DOWN, 2, "device")
    decayed = compare(torch, world, DOWN, 2, "device", weight_decay=0.02)
    # The tolerance cannot hide it: decay changes the outcome by far more.
    for name, value in decayed.tensors.items():
        assert distance(plain.tensors[name], value) > 0.01


@pytest.mark.parity
def test_mean_over_tokens(torch, world):
    by_token = compare(torch, world, DOWN, 2, "device", average="token")
    by_example = compare(torch, world, DOWN, 2, "device")
    assert abs(by_token.losses[0] / by_example.losses[0] - 1) > 1e-3


@pytest.mark.parity
def test_skipped_batches_and_early_stop(torch, world):
    theirs = compare(torch, world, LAYER, 1, epochs=25, loss_floor=1.4)  # a floor that few steps reach
    assert theirs.stopped == "loss_floor" and len(theirs.epochs) < 25
    # Steps follow skips, so that a count or a moment that moved in a skip would show in them.
    assert sum(theirs.skipped) >= 3 and not all(theirs.skipped[theirs.skipped.index(True) :])


@pytest.mark.parity
def test_depth_first(torch, world):
    """Five steps on each of three mini-batches; then with a floor that some of them reach early."""
    compare(torch, world, DOWN, 2, "device", epochs=5, pipeline="depth")
    theirs = compare(torch, world, DOWN, 2, "device", epochs=30, loss_floor=2.5, pipeline="depth")
    assert theirs.skipped[-1] and sum(theirs.skipped) >= 2 and len(theirs.losses) < 3 * 30


@pytest.mark.parity
@pytest.mark.parametrize("pipeline", ["depth", "breadth"])
def test_ft_l_trains_the_last_token_alone(torch, world, pipeline):
    """As run.encode_requests makes its corpus."""
    corpus = dataclasses.replace(world.corpus, target_start=world.corpus.lengths - 1)
    last = dataclasses.replace(world, corpus=corpus)
    own = compare(torch, last, DOWN, 2, "device", epochs=7 if pipeline == "breadth" else 5, pipeline=pipeline)
    every = compare(torch, world, DOWN, 2, "device", epochs=5, pipeline="depth")
    assert abs(own.losses[0] / every.losses[0] - 1) > 1e-3


@pytest.mark.parity
def test_norm_constraint_clips_around_the_base(torch, world):
    bound = 5e-3  # half of Adam's first step
    theirs = compare(torch, world, DOWN, 2, "device", epochs=5, pipeline="depth", norm_constraint=bound)
    (name,) = theirs.tensors
    moved = np.abs(theirs.tensors[name] - dict(world.model.named_parameters())[name].detach().numpy())
    assert moved.max() == pytest.approx(bound, rel=1e-3) and (moved > 0.99 * bound).mean() > 0.3


# --------------------------------------------------------------------------- what a step costs in memory

# Frozen weights dominate (0.87 GB, 48 layers; a step of 16 tokens), and nothing of it is allocated.
WIDE = parse_spec(
    {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
)
SITE = "model.layers.4.mlp.down_proj.weight"
HYPER = Hyper(1e-3, 0.0, 1e-2)


def abstract_step(int8=False):
    """(state, params, inputs, batch) of a step on WIDE, as shapes only."""
    params = Params(WIDE, abstract_weights(WIDE, jnp.dtype("float32"), int8))
    state = jax.eval_shape(init_state, {SITE: jax.ShapeDtypeStruct((512, 2048), jnp.float32)})
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    grid, listed = ints((1, 16)), ints((8,))
    batch = Batch(
        index=grid,
        rows=Rows(grid, grid),
        targets=Targets(listed, listed, ints((1, 8))),
        labels=listed,
        weight=jax.ShapeDtypeStruct((8,), jnp.float32),
        example=listed,
    )
    return state, params, Inputs(ints((64,)), 0), batch


def size(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def extra_bytes(compiled):
    """What a step allocates beside its arguments: temporaries, and outputs that no donation pays for."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


# An eighth of the frozen weights: less than a gradient or a copy of one of the MLP's stacks would take.
LIMIT = size(abstract_weights(WIDE, jnp.dtype("float32"))) / 8


def compile_step(state, params, inputs, batch):
    return train_step.lower(HYPER, state, params, inputs, batch, Regularizers()).compile()


def test_only_the_site_has_a_gradient_and_the_state_is_donated():
    state, params, *rest = abstract_step()
    compiled = compile_step(state, params, *rest)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size(state)  # the new state lies where the old one lay
    assert memory.output_size_in_bytes < size(state) + 1024  # it and the loss
    # No gradient of frozen weights, nor a copy of those above the site, which the backward pass reads.
    assert size(params.weights["down"]) > LIMIT
    assert extra_bytes(compiled) < LIMIT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_stack_of_int8_weights_is_dequantized(dtype):
    state, params, *rest = abstract_step(int8=True)
    weights = {k: v if hasattr(v, "scale") else v.update(dtype=dtype) for k, v in params.weights.items()}
    compiled = compile_step(state, Params(WIDE, weights), *rest)
    assert extra_bytes(compiled) < size(weights["down"].values) * 4  # one stack of the MLP in float32
    stacks = set(re.findall(r"\b(\w+)\[48,\d+,\d+\]", compiled.as_text()))
    assert "s8" in stacks and not stacks & {"f32", "bf16"}


def test_a_gradient_of_the_frozen_weights_would_show():
    state, params, *rest = abstract_step()

    @functools.partial(jax.jit, donate_argnums=0)
    def careless(state, params, inputs, batch):
        """The same step, but it differentiates everything and drops what it does not need."""
        own = lambda theta, params: batch_loss(theta, params, inputs, batch)  # noqa: E731
        loss, (grads, others) = jax.value_and_grad(own, argnums=(0, 1))(state.theta, params)
        norm = optax.global_norm((grads, others))  # as clipping by the global norm would
        grads = jax.tree.map(lambda g: g / jnp.maximum(norm, 1), grads)
        updates, optimizer = make_optimizer(HYPER, {}).update(grads, state.optimizer, state.theta, loss=loss)
        return EditState(optax.apply_updates(state.theta, updates), optimizer), loss

    compiled = careless.lower(state, params, *rest).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= size(state)
    assert extra_bytes(compiled) > 8 * LIMIT

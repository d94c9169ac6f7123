"""The divergence from the base model on retained texts, against torch."""

import dataclasses

import jax
import numpy as np
import pytest

from locft_jax import Config
from locft_jax.editing.regularizers.kl import TEXTS, retain_batches
from locft_jax.editing.step import divergence, target_logits
from locft_jax.io.hf_load import load_model
from locft_jax.model.activation_cache import Source
from locft_jax.model.weights import take_tensor

SITE = "model.layers.2.mlp.down_proj.weight"
RNG = np.random.default_rng(0)
IDS = [RNG.integers(1, 300, n).tolist() for n in RNG.integers(3, 20, 40)]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


@pytest.fixture(scope="module")
def edited(model):
    """Another matrix at SITE."""
    own = np.asarray(take_tensor(model.params, SITE))
    return own + 2 * RNG.standard_normal(own.shape, np.float32) * own.std()


def ours(model, mode, layer, value, ids=IDS, tokens="all"):
    """(divergence, its gradient at SITE) of the first retained mini-batch."""
    source, budgets = Source(np.zeros((0, 1)), layer, mode), (0.0 if mode == "host" else 1e9, 1e9)
    config = Config(preserve_kl=2, row_length=32, preserve_tokens=tokens, preserve_data="templates")
    retain = retain_batches(model.params, model.mesh, source, config, ids, budgets)(0)

    @jax.jit
    @jax.value_and_grad
    def measure(value, params, retain):
        return divergence(target_logits(params.over({SITE: value}), retain.inputs, retain.batch), retain)

    assert retain.strength == 2 and retain.inputs.layer == layer
    return measure(value, model.params, retain)


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_divergence_and_gradient_equal_torchs(torch, model, tiny_model_dir, edited, tokens):
    from transformers import AutoModelForCausalLM

    base, other = (
        AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float64) for _ in range(2)
    )
    matrix = other.get_parameter(SITE)
    matrix.data = torch.tensor(edited, dtype=torch.float64)
    total, count = 0, sum(map(len, IDS)) if tokens == "all" else len(IDS)
    used = slice(0 if tokens == "all" else -1, None)
    for ids in IDS:
        with torch.no_grad():
            p = base(torch.tensor([ids])).logits[0, used].softmax(-1)
        q = other(torch.tensor([ids])).logits[0, used].softmax(-1)
        top = p.topk(32).indices
        few = lambda a, top=top: torch.cat([a.gather(1, top), 1 - a.gather(1, top).sum(1, True)], 1)  # noqa: E731
        total += (few(p) * (few(p).log() - few(q).log())).sum() / count
    (want,) = torch.autograd.grad(total, matrix)
    assert total.item() > 0.05
    for mode, layer in (("off", 0), ("device", 2), ("host", 2)):
        value, gradient = ours(model, mode, layer, edited, tokens=tokens)
        np.testing.assert_allclose(value, total.item(), rtol=1e-4, err_msg=mode)
        error = np.abs(gradient - want.numpy()).max() / np.abs(want.numpy()).max()
        assert error < 1e-4, mode


def test_the_base_model_has_no_divergence(model):
    own = take_tensor(model.params, SITE)
    value, gradient = ours(model, "device", 2, own)
    assert abs(float(value)) < 1e-6 and np.abs(gradient).max() < 1e-6


def test_a_certain_token_gives_no_infinity(model, edited):
    """Logits a hundred times as large: the remainder's probability is 0 in float32."""
    sure = {**model.weights, "norm": 100 * model.weights["norm"]}
    params = dataclasses.replace(model.params, weights=sure)
    value, gradient = ours(dataclasses.replace(model, params=params), "device", 2, edited)
    assert np.isfinite(value) and value > 1 and np.isfinite(gradient).all()


def test_mini_batches_return_in_turn_and_hold_every_text(model):
    ids = [[1 + i // 50, 2 + i % 50, 3] for i in range(2 * TEXTS + 5)]
    given = (model.params, model.mesh, Source(None, 2, "off"))
    retain = retain_batches(*given, Config(preserve_kl=1), ids, (1e9, 1e9))
    seen = [retain(visit) for visit in range(4)]
    assert sum(int((one.batch.example >= 0).sum()) for one in seen[:3]) == 3 * len(ids)
    for a, b in zip(jax.tree.leaves(seen[0]), jax.tree.leaves(seen[3]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(seen[0].logp, seen[1].logp)
    assert retain_batches(*given, Config(), ids, (1e9, 1e9))(0) is None

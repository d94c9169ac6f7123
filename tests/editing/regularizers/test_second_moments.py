"""Second moments of inputs and output gradients against transformers and torch, exact and of leading
eigenvectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.editing.regularizers.second_moments import gradient_moments, second_moments

SITE = [f"model.layers.{l}.{m}.weight" for l, m in ((1, "self_attn.q_proj"), (1, "self_attn.k_proj"),
        (1, "self_attn.o_proj"), (2, "mlp.up_proj"), (2, "mlp.down_proj"))]  # fmt: skip


@pytest.fixture(scope="module")
def moments(model, texts):
    return {name: np.asarray(c) for name, c in second_moments(model, SITE, texts, 32).items()}


@pytest.mark.parametrize("last", [False, True])
def test_second_moments_equal_those_of_transformers_activations(
    torch, tiny_model_dir, model, texts, moments, last
):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)
    sums = {}

    def watch(name):
        def hook(module, inputs):
            x = inputs[0][0, -1:] if last else inputs[0][0, 1:]
            x = x.double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    for name in SITE:
        reference.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for ids in texts:
            reference(torch.tensor([ids]))
    assert moments.keys() == set(SITE)
    given = model, SITE, texts, 32
    for name, c in (second_moments(*given, last=True) if last else moments).items():
        want = sums[name] / (len(texts) if last else sum(len(ids) - 1 for ids in texts))
        assert c.dtype == np.float32
        np.testing.assert_allclose(c, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_matrices_with_one_input_share_one_statistic(model, texts):
    names = [n for n in SITE if "q_proj" in n or "k_proj" in n]
    found = second_moments(model, names, texts, 32)
    assert found[names[0]] is found[names[1]]


def test_eight_devices_give_the_same_statistics(split_model, texts, moments):
    for name, c in second_moments(split_model, SITE, texts, 32).items():
        np.testing.assert_allclose(c, moments[name], rtol=1e-4, atol=1e-5 * moments[name].max())


@pytest.mark.parametrize("last", [False, True])
def test_gradient_moments_equal_torchs(torch, model, tiny_model_dir, texts, last):
    """The labels come from `sampled`, by the rule that the code states; everything else is torch's."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float64)
    found = gradient_moments(model, SITE, texts[:20], 32, seed=3, last=last)
    sums, at, used = dict.fromkeys(SITE, 0), 0, slice(-1 if last else 1, None)
    for name in SITE:
        module = reference.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(lambda m, i, out, name=name: kept.__setitem__(name, out))
    draw = jax.vmap(lambda place, s: jax.random.categorical(jax.random.fold_in(jax.random.key(3), place), s))
    for ids in texts[:20]:
        kept = {}
        scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        labels = draw(at + jnp.arange(len(ids)), jnp.asarray(scores.detach().numpy(), jnp.float32))
        at += len(ids) + 1  # a corpus has one more token a text
        own = scores.gather(1, torch.tensor(np.asarray(labels, np.int64))[:, None])[used].sum()
        for name, g in zip(SITE, torch.autograd.grad(own, [kept[n] for n in SITE]), strict=True):
            sums[name] += (g[0, used].T @ g[0, used]).numpy()
    for name, got in found.items():
        want = sums[name] / (20 if last else sum(len(ids) - 1 for ids in texts[:20]))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=name)


# ---------------------------------------------------------------- too wide for a matrix


def test_leading_eigenvectors_are_those_of_the_whole_moment(split_model, texts, moments, narrow):
    """On eight devices; test_preconditioner.py has them on one."""
    for name, own in second_moments(split_model, SITE, texts, 32).items():
        values, vectors = np.linalg.eigh(moments[name].astype(np.float64))
        assert own.vectors.shape == (len(values), 24) and own.trace == pytest.approx(values.sum(), rel=1e-4)
        np.testing.assert_allclose(own.vectors.T @ own.vectors, np.eye(24), atol=1e-5)
        # Three passes find those well apart from the rest; of the others the span is what counts.
        np.testing.assert_allclose(own.values[:3], values[::-1][:3], rtol=0.02, err_msg=name)
        held = np.trace(own.vectors.T @ moments[name] @ own.vectors)
        assert held == pytest.approx(own.values.sum(), rel=1e-3) and held > 0.95 * values[-24:].sum()

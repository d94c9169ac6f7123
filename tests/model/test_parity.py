"""Our forward and our greedy decoding against transformers' torch models, float32."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, make_family  # noqa: E402

from locft_jax.evaluation.verify import Prompts, answer  # noqa: E402
from locft_jax.io import hf_folder, hf_load  # noqa: E402
from locft_jax.model import decoder  # noqa: E402
from locft_jax.model.model import Model  # noqa: E402
from locft_jax.model.sharding import make_mesh, tensor_spec  # noqa: E402
from locft_jax.model.weights import Params, weight_table  # noqa: E402

pytestmark = pytest.mark.parity
forward = jax.jit(decoder.logits)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, torch, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_family(request.param, folder), hf_folder.open_folder(str(folder))


def test_logits_equal_transformers_on_one_and_eight_devices(family, torch):
    model, checkpoint = family
    tokens = np.random.default_rng(1).integers(0, 96, (2, 24))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    for shape in ({"data": 1, "model": 1}, {"data": 1, "model": 8}, {"data": 4, "model": 2}):
        devices = jax.devices()[:1] if shape["model"] == 1 else None
        mesh = make_mesh(shape, devices)
        weights = hf_load.load_weights(checkpoint, mesh)
        for key, row in weight_table(checkpoint.spec).items():
            assert weights[key].sharding.spec == tensor_spec(mesh, checkpoint.spec, row), key
        got = np.asarray(forward(Params(checkpoint.spec, weights), tokens))
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.5  # the tolerance means something


def test_greedy_generation_equals_transformers(family, torch):
    model, checkpoint = family
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 96, n).tolist() for n in (1, 3, 7, 12, 5, 9, 2, 40, 4)]
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    weights = hf_load.load_weights(checkpoint, mesh)
    stop = np.zeros(97, bool)
    stop[[96, 11, 12]] = True  # several stop tokens, so that answers end at different times
    ours = Model(Params(checkpoint.spec, weights), mesh, None, checkpoint)
    got, _ = answer(ours, Prompts(prompts, [[]] * len(prompts), 16, stop))
    for prompt, said in zip(prompts, got, strict=True):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=[96, 11, 12],
                pad_token_id=96,
            )
        assert said == out[0, len(prompt) :].tolist()


def test_bfloat16_stays_near_float32(family, torch):
    _, checkpoint = family
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    tokens = np.random.default_rng(3).integers(0, 96, (2, 16))
    exact = np.asarray(forward(Params(checkpoint.spec, hf_load.load_weights(checkpoint, mesh)), tokens))
    half = hf_load.load_weights(checkpoint, mesh, jax.numpy.bfloat16)
    got = np.asarray(forward(Params(checkpoint.spec, half), tokens))
    # bfloat16 keeps 8 bits: 0.4 % a rounding, and a handful of roundings a layer. 5 % of the logits'
    # own scale is the distance we state.
    assert np.sqrt(np.mean((got - exact) ** 2)) < 0.05 * np.std(exact)


def test_unsharded_where_the_mesh_does_not_divide(torch, tmp_path):
    make_family("llama", tmp_path)
    spec = hf_folder.open_folder(str(tmp_path)).spec
    mesh = make_mesh({"data": 1, "model": 8})
    specs = {k: tensor_spec(mesh, spec, row) for k, row in weight_table(spec).items()}
    assert specs["gate"] == jax.sharding.PartitionSpec(None, "model")  # 48 / 8
    assert specs["q"] == jax.sharding.PartitionSpec()  # 4 heads on 8 devices
    assert specs["embed"] == jax.sharding.PartitionSpec()  # 97 is prime

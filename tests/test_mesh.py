"""Eight devices are one device, where little divides: fewer KV heads than the model axis, a vocabulary that
no axis divides, an MLP width that 4 divides and 8 does not, and batches whose rows no data axis divides.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from locft_jax import Config, edit, load_model
from locft_jax.data.capability import read_capability
from locft_jax.io.hf_save import save_hf
from locft_jax.model.sharding import tensor_sharding
from locft_jax.model.weights import locate_tensor, weight_table

ODD = {
    "num_hidden_layers": 2,
    "vocab_size": 321,
    "intermediate_size": 60,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
# Which tensors each mesh can split, data x model.
ATTENTION = {"q", "k", "v", "o"}
SPLIT = {(1, 8): ATTENTION, (2, 4): {*ATTENTION, "gate", "up", "down"}, (8, 1): set()}
SETTINGS = {
    "layer": 1,
    "rewrite_module": "model.layers.{}",
    "learning_rate": 1e-2,
    "batch_size": 5,
    "num_epochs": 4,
}


@pytest.fixture(scope="module")
def folder(make_model, make_tokenizer, tmp_path_factory):
    """A model whose sizes fit no mesh."""
    return make_tokenizer(make_model(tmp_path_factory.mktemp("odd") / "model", **ODD))


@pytest.fixture(scope="module")
def run(folder, edits_file, skills_file):
    """`run(mesh)` -> (model, result of an edit of 11 facts; but on (8, 1) with their probes), once a mesh."""
    edits, skills = json.loads(edits_file.read_text())[:11], read_capability(str(skills_file))

    @functools.cache
    def once(mesh):
        model = load_model(str(folder), mesh={"data": mesh[0], "model": mesh[1]})
        config = Config(**SETTINGS, loss_floor=0, evaluate=mesh != (8, 1))
        return model, edit(model, edits, config, skills)

    return once


@pytest.mark.parametrize("mesh", SPLIT)
def test_every_array_lies_where_the_table_puts_it(run, mesh):
    model, result = run(mesh)
    table = weight_table(model.spec)
    assert set(model.weights) == set(table)
    for key, row in table.items():
        array = model.weights[key]
        assert array.sharding == tensor_sharding(model.mesh, model.spec, row), key
        assert array.addressable_shards[0].data.size * (mesh[1] if key in SPLIT[mesh] else 1) == array.size
    assert len(result.edited.overrides) == 9
    for name, array in result.edited.overrides.items():
        row, _ = locate_tensor(model.spec, name)
        assert array.sharding == tensor_sharding(model.mesh, model.spec, row, stacked=False), name
        assert array.sharding.is_fully_replicated == (row.key not in SPLIT[mesh]), name


@pytest.mark.parametrize("mesh", SPLIT)
def test_an_edit_is_that_of_one_device(run, mesh):
    (_, one), (_, result) = run((1, 1)), run(mesh)
    losses = lambda r: [step["loss"] for step in r.steps]  # noqa: E731
    assert len(losses(one)) == 12 and losses(one)[-1] < 0.8 * losses(one)[0]
    np.testing.assert_allclose(losses(result), losses(one), rtol=1e-5)
    for name, value in one.delta.new.items():
        move = np.linalg.norm(value - one.delta.base[name])
        assert move > 0.01 and np.linalg.norm(result.delta.new[name] - value) < 1e-3 * move, name
    if result.report["config"]["evaluate"]:
        assert result.predictions == one.predictions
        assert len({line["after"] for line in one.predictions}) > 3  # they say something
        assert [result.report[k] for k in ("before", "after")] == [one.report[k] for k in ("before", "after")]


@pytest.mark.parametrize("mesh", [(1, 1), *SPLIT])
def test_an_export_is_whole(run, folder, tmp_path, mesh):
    model, result = run(mesh)
    assert {n: a.shape for n, a in result.delta.new.items()} == {
        n: a.shape for n, a in result.delta.base.items()
    }
    save_hf(model.folder, result.delta.new, tmp_path / "hf")
    base, edited = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "hf"))
    for name, value in base.items():
        assert edited[name].tobytes() == result.delta.new.get(name, value).tobytes(), name
    again = load_model(str(tmp_path / "hf"), mesh={"data": 1, "model": 1})
    for name, value in result.edited.overrides.items():
        row, layer = locate_tensor(model.spec, name)
        np.testing.assert_array_equal(again.weights[row.key][layer], jax.device_get(value))

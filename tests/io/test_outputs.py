"""What a run leaves behind: the orbax checkpoint, where results may go, and the versions that made them."""

import os
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_save, orbax_export, outputs
from locft_jax.model.sharding import make_mesh
from locft_jax.run_identity import versions

DOWN = "model.layers.1.mlp.down_proj.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- orbax


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def saved(request, tiny_model_dir, make_variant, tmp_path_factory):
    """A checkpoint and an edit of it, saved both ways: (folder with hf/ and orbax/, edited tensor)."""
    place = tmp_path_factory.mktemp(request.param)
    base = make_variant(tiny_model_dir, place / "base", request.param, files=2)
    checkpoint = hf_folder.open_folder(str(base))
    new = {DOWN: (0.1 * np.arange(32 * 64).reshape(32, 64)).astype(checkpoint.dtype)}
    hf_save.save_hf(checkpoint, new, place / "hf")
    orbax_export.save_orbax(checkpoint, new, place / "orbax")
    return place


def test_orbax_restores_to_the_tensors_of_hf(saved):
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(saved / "orbax")
    again = hf_folder.open_folder(str(saved / "hf"))
    assert set(restored) == set(again.tensors)
    for name, array in restored.items():
        expected = hf_folder.read_tensor(again, name)
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype), name
        assert np.asarray(array).tobytes() == expected.tobytes(), name
    assert float(restored[DOWN][0, 1]) == pytest.approx(0.1, rel=1e-2)


def test_config_json_stands_beside_the_arrays(saved):
    assert (saved / "orbax" / "config.json").read_bytes() == (saved / "base" / "config.json").read_bytes()


def test_orbax_restores_with_any_sharding(saved):
    mesh = make_mesh({"data": 2, "model": 4})
    again = hf_folder.open_folder(str(saved / "hf"))

    def wanted(info):
        parts = ("model",) if info.shape[0] % 4 == 0 else (None,)
        sharding = NamedSharding(mesh, PartitionSpec(*parts))
        return jax.ShapeDtypeStruct(info.shape, hf_folder.DTYPES[info.dtype], sharding=sharding)

    target = {name: wanted(info) for name, info in again.tensors.items()}
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(saved / "orbax", target)
    for name, array in restored.items():
        assert array.sharding == target[name].sharding
        assert np.asarray(array).tobytes() == hf_folder.read_tensor(again, name).tobytes()
    assert restored[DOWN].sharding.shard_shape((32, 64)) == (8, 64)
    assert len(restored[DOWN].addressable_shards) == 8


# ---------------------------------------------------------------- --out


def refused(out: Path, overwrite: bool = False) -> str:
    with pytest.raises(UserError) as error:
        outputs.check_out(out, overwrite)
    return str(error.value)


def test_a_new_or_empty_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "a" / "b" / "c", tmp_path / "empty", Path("relative/out")):
        outputs.check_out(out, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]  # looking makes nothing


def test_an_existing_folder_is_refused_unless_it_may_be_replaced(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    message = refused(tmp_path)
    assert str(tmp_path) in message and "already exists" in message and "--overwrite" in message
    outputs.check_out(tmp_path, True)


def test_only_results_are_ever_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "no report.json" in refused(tmp_path, True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way(tmp_path, overwrite):
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file", overwrite)
    assert f"{tmp_path / 'file'} is a file" in refused(tmp_path / "file" / "below" / "it", overwrite)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert f"{tmp_path} cannot be written" in refused(tmp_path / "new" / "out")


def test_versions_are_those_that_run():
    found = versions()
    assert (found["jax"], found["numpy"], found["backend"]) == (version("jax"), np.__version__, "cpu")
    assert {"python", "jaxlib", "flax", "optax", "transformers", "locft-jax"} <= set(found)

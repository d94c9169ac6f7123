"""Deltas: saved and read back, bound to the model they were made on."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from locft_jax.errors import UserError
from locft_jax.model import hf
from locft_jax.model.delta import Delta, check_delta, fingerprint, load_delta, make_delta, save_delta

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
ONE = {"data": 1, "model": 1}


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir):
    return hf.open_checkpoint(str(tiny_model_dir))


@pytest.fixture(scope="module")
def new():
    rng = np.random.default_rng(0)
    return {DOWN: rng.standard_normal((32, 64), np.float32), NORM: rng.standard_normal(32, np.float32)}


@pytest.fixture
def delta(checkpoint, new):
    return make_delta(checkpoint, new, {"config": {"b": 1, "a": [2]}, "edits": 12, "data_sha256": "abc"})


@pytest.fixture
def other(tiny_model_dir, tmp_path):
    """`other(change)` -> the checkpoint of a copy of the tiny model whose tensors were changed."""

    def make(change):
        folder = shutil.copytree(tiny_model_dir, tmp_path / "other")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return hf.open_checkpoint(str(folder))

    return make


def refused(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_delta_holds_new_and_base_tensors_and_where_it_comes_from(delta, checkpoint, new, tmp_path):
    path = tmp_path / "delta.safetensors"
    save_delta(delta, path)
    stored = load_file(path)
    assert set(stored) == {DOWN, NORM, f"base::{DOWN}", f"base::{NORM}"}
    for name in new:
        assert stored[name].tobytes() == new[name].tobytes()
        assert stored[f"base::{name}"].tobytes() == hf.read_tensor(checkpoint, name).tobytes()
    with safe_open(path, "np") as f:
        metadata = f.metadata()
    assert metadata["fingerprint"] == fingerprint(checkpoint, delta.base)
    assert json.loads(metadata["config"]) == {"a": [2], "b": 1}
    assert (metadata["edits"], metadata["data_sha256"]) == ("12", "abc")
    size = sum(a.nbytes for a in new.values())
    assert 2 * size < path.stat().st_size < 2 * size + 2000  # in proportion to what was edited

    backwards = Delta(
        *({k: v for k, v in reversed(d.items())} for d in (delta.new, delta.base, delta.metadata))
    )
    save_delta(backwards, tmp_path / "backwards.safetensors")
    assert (tmp_path / "backwards.safetensors").read_bytes() == path.read_bytes()  # same delta, same bytes

    again = load_delta(path)
    assert again.metadata == delta.metadata and set(again.new) == set(again.base) == set(new)
    assert all(again.new[n].tobytes() == new[n].tobytes() for n in new)
    check_delta(checkpoint, again)


def test_the_checkpoints_dtype_is_kept(tiny_model_dir, make_variant, tmp_path, new):
    checkpoint = hf.open_checkpoint(str(make_variant(tiny_model_dir, tmp_path / "bf16", "bfloat16", files=3)))
    delta = make_delta(checkpoint, hf.to_checkpoint_dtype(checkpoint, new), {})
    save_delta(delta, tmp_path / "d.safetensors")
    again = load_delta(tmp_path / "d.safetensors")
    assert {a.dtype for a in (*again.new.values(), *again.base.values())} == {np.dtype(ml_dtypes.bfloat16)}
    check_delta(checkpoint, again)


def test_values_of_any_memory_order_are_saved_right(checkpoint, tmp_path):
    value = np.arange(64 * 32, dtype=np.float32).reshape(64, 32).T
    save_delta(make_delta(checkpoint, {DOWN: value}, {}), tmp_path / "d.safetensors")
    np.testing.assert_array_equal(load_delta(tmp_path / "d.safetensors").new[DOWN], value)


def test_a_model_with_a_delta_has_its_tensors(tiny_model_dir, delta, new):
    model = hf.load_model(str(tiny_model_dir), mesh=ONE)
    edited = model.apply(delta)
    assert model.edits == {} and set(edited.edits) == set(new)
    for name in new:
        np.testing.assert_array_equal(edited.edits[name], new[name])


def test_the_fingerprint_is_of_names_dtypes_shapes_and_the_edited_bytes(checkpoint, other):
    base = {DOWN: hf.read_tensor(checkpoint, DOWN)}
    print_of = fingerprint(checkpoint, base)
    assert print_of == fingerprint(checkpoint, dict(base)) and len(print_of) == 64
    assert print_of != fingerprint(checkpoint, {})
    assert print_of != fingerprint(checkpoint, {DOWN: base[DOWN] + 1e-6})
    assert print_of != fingerprint(checkpoint, {DOWN.replace("1", "2"): base[DOWN]})
    changed = other(lambda tensors: tensors.update(extra=np.zeros(1)))
    assert print_of != fingerprint(changed, base)


def test_another_base_is_refused_and_what_differs_is_named(delta, other):
    def one_bit(tensors):
        tensors[NORM].view(np.uint32)[5] ^= 1

    message = refused(check_delta, other(one_bit), delta)
    assert NORM in message and "not the one this delta was made on" in message


def test_a_change_elsewhere_that_keeps_the_shapes_is_no_other_base(delta, other):
    """The delta then still does what it says: it replaces the same bytes by the same bytes."""
    check_delta(
        other(lambda tensors: tensors.update({"lm_head.weight": np.zeros((320, 32), np.float32)})), delta
    )


def test_another_architecture_is_refused(delta, other, checkpoint):
    message = refused(check_delta, other(lambda tensors: tensors.update(extra=np.zeros(1))), delta)
    assert "fingerprints differ" in message
    deeper = {DOWN.replace("1", "9"): delta.new[DOWN]}
    message = refused(check_delta, checkpoint, Delta(deeper, deeper, delta.metadata))
    assert f"has no tensor {DOWN.replace('1', '9')}" in message


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({DOWN: np.zeros(2)}, {"fingerprint": "x"}),
        ({f"base::{DOWN}": np.zeros(2)}, {"fingerprint": "x"}),
        ({DOWN: np.zeros(2), f"base::{DOWN}": np.zeros(2)}, {"format": "pt"}),
        ({DOWN: np.zeros(2), f"base::{DOWN}": np.zeros(2)}, None),
        ({}, {"fingerprint": "x"}),
    ],
)
def test_files_that_are_no_deltas(tmp_path, tensors, metadata):
    path = tmp_path / "d.safetensors"
    save_file(tensors, path, metadata)
    message = refused(load_delta, path)
    assert str(path) in message and "base:: twin" in message


def test_unreadable_files(delta, tmp_path):
    path = tmp_path / "d.safetensors"
    assert "not a readable delta file" in refused(load_delta, path)  # missing
    assert "not a readable delta file" in refused(load_delta, tmp_path)  # a folder
    save_delta(delta, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:200], whole[:-1], b"\xff" * 64 + whole[64:]):
        path.write_bytes(damaged)
        assert f"{path}: not a readable delta file" in refused(load_delta, path)


def test_new_tensors_must_have_their_bases_shape_and_dtype(tmp_path):
    for new in (np.zeros((2, 3), np.float32), np.zeros((2, 2), np.float16)):
        path = tmp_path / "d.safetensors"
        save_delta(Delta({DOWN: new}, {DOWN: np.zeros((2, 2), np.float32)}, {"fingerprint": "x"}), path)
        assert DOWN in refused(load_delta, path)


def test_deltas_that_no_model_could_use(delta, tmp_path):
    """The first was found by fuzzing: numpy has no such type."""
    path = tmp_path / "delta.safetensors"
    save_delta(delta, path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b'"F32","shape":[32]', b'"F8_E4M3","shape":[128]')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert "is F8_E4M3; it must be F32, F16, BF16" in refused(load_delta, path)

    spoiled = {**delta.new, NORM: np.where(np.arange(32) == 7, np.inf, delta.new[NORM]).astype(np.float32)}
    save_delta(Delta(spoiled, delta.base, delta.metadata), path)
    assert f"NaN or infinity in {NORM}" in refused(load_delta, path)

"""Deltas: saved and read back, bound to the model they were made on."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_load, hf_save
from locft_jax.io.delta import Delta, check_delta, fingerprint, load_delta, make_delta, save_delta
from locft_jax.io.delta_ops import diff_delta

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
ONE = {"data": 1, "model": 1}


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir):
    return hf_folder.open_folder(str(tiny_model_dir))


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
        return hf_folder.open_folder(str(folder))

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
        assert stored[f"base::{name}"].tobytes() == hf_folder.read_tensor(checkpoint, name).tobytes()
    with safe_open(path, "np") as f:
        metadata = f.metadata()
    assert metadata["fingerprint"] == fingerprint(checkpoint.layout, delta.base)
    assert json.loads(metadata["config"]) == {"a": [2], "b": 1}
    assert (metadata["edits"], metadata["data_sha256"]) == ("12", "abc")
    size = sum(a.nbytes for a in new.values())
    listing = len(metadata["tensors"])  # of every tensor: name, dtype, shape
    assert (
        2 * size < path.stat().st_size < 2 * size + 1.2 * listing + 1200
    )  # in proportion to what was edited
    assert sorted(n for n, _, _ in json.loads(metadata["tensors"])) == sorted(checkpoint.tensors)

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
    folder = make_variant(tiny_model_dir, tmp_path / "bf16", "bfloat16", files=3)
    checkpoint = hf_folder.open_folder(str(folder))
    delta = make_delta(checkpoint, hf_save.to_checkpoint_dtype(checkpoint, new), {})
    save_delta(delta, tmp_path / "d.safetensors")
    again = load_delta(tmp_path / "d.safetensors")
    assert {a.dtype for a in (*again.new.values(), *again.base.values())} == {np.dtype(ml_dtypes.bfloat16)}
    check_delta(checkpoint, again)


def test_values_of_any_memory_order_are_saved_right(checkpoint, tmp_path):
    value = np.arange(64 * 32, dtype=np.float32).reshape(64, 32).T
    save_delta(make_delta(checkpoint, {DOWN: value}, {}), tmp_path / "d.safetensors")
    np.testing.assert_array_equal(load_delta(tmp_path / "d.safetensors").new[DOWN], value)


def test_a_model_with_a_delta_has_its_tensors(tiny_model_dir, delta, new):
    model = hf_load.load_model(str(tiny_model_dir), mesh=ONE)
    edited = model.apply(delta)
    assert model.overrides == {} and set(edited.overrides) == set(new)
    for name in new:
        np.testing.assert_array_equal(edited.overrides[name], new[name])


def test_the_fingerprint_is_of_names_dtypes_shapes_and_the_edited_bytes(checkpoint, other):
    base = {DOWN: hf_folder.read_tensor(checkpoint, DOWN)}
    print_of = fingerprint(checkpoint.layout, base)
    assert print_of == fingerprint(checkpoint.layout, dict(base)) and len(print_of) == 64
    assert print_of != fingerprint(checkpoint.layout, {})
    assert print_of != fingerprint(checkpoint.layout, {DOWN: base[DOWN] + 1e-6})
    assert print_of != fingerprint(checkpoint.layout, {DOWN.replace("1", "2"): base[DOWN]})
    changed = other(lambda tensors: tensors.update(extra=np.zeros(1)))
    assert print_of != fingerprint(changed.layout, base)


def test_another_base_is_refused_and_what_differs_is_named(delta, other):
    def one_bit(tensors):
        tensors[NORM].view(np.uint32)[5] ^= 1

    message = refused(check_delta, other(one_bit), delta)
    assert message.endswith(f"is not the model that this delta was made on: {NORM} has other values")


def test_all_that_differs_is_listed(delta, checkpoint, other):
    def worse(tensors):
        tensors[DOWN] = tensors[DOWN] + 1
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
        tensors["extra"] = np.zeros(1)
        tensors[NORM] = delta.new[NORM]

    with pytest.raises(UserError) as error:
        check_delta(other(worse), delta)
    head, *lines = str(error.value).split("\n  ")
    assert head.endswith("is not the model that this delta was made on:")
    assert lines == [
        "extra should not be there",
        "model.norm.weight is F16 [32], not F32 [32]",
        f"{DOWN} has other values",
        f"{NORM} holds this delta's edit already",
    ]
    many = json.dumps([[f"tensor{i}", "F32", [1]] for i in range(40)])
    with pytest.raises(UserError) as error:
        check_delta(checkpoint, Delta(delta.new, delta.base, {**delta.metadata, "tensors": many}))
    lines = str(error.value).split("\n")
    assert len(lines) == 12 and "should not be there" in lines[1]
    assert lines[-1] == f"  ... and {40 + len(checkpoint.tensors) - 10} more"


def test_the_model_that_a_delta_makes_is_known_by_its_edited_tensors(delta, checkpoint, other):
    edited = other(lambda tensors: tensors.update(delta.new))
    check_delta(edited, delta, edited=True)
    with pytest.raises(
        UserError, match=f"not the model that this delta makes:\n  {DOWN} is as it was before"
    ):
        check_delta(checkpoint, delta, edited=True)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_can_be_read_and_taken_back_but_not_applied(
    checkpoint, new, other, tmp_path, value
):
    broken = {DOWN: new[DOWN].copy()}
    broken[DOWN][3, 4] = value
    save_delta(make_delta(checkpoint, broken, {}), tmp_path / "d.safetensors")
    again = load_delta(tmp_path / "d.safetensors")
    assert f"not all finite (NaN or infinity): {DOWN}" in refused(check_delta, checkpoint, again)
    check_delta(other(lambda tensors: tensors.update(broken)), again, edited=True)


def test_a_change_elsewhere_that_keeps_the_shapes_is_no_other_base(delta, other):
    """The delta then still does what it says: it replaces the same bytes by the same bytes."""
    check_delta(
        other(lambda tensors: tensors.update({"lm_head.weight": np.zeros((320, 32), np.float32)})), delta
    )


def test_another_architecture_is_refused(delta, other, checkpoint):
    message = refused(check_delta, other(lambda tensors: tensors.update(extra=np.zeros(1))), delta)
    assert "extra should not be there" in message


def test_a_delta_that_does_not_list_the_tensors_is_checked_by_its_fingerprint(delta, checkpoint, other):
    """As earlier versions wrote them."""
    short = {k: v for k, v in delta.metadata.items() if k != "tensors"}
    old = Delta(delta.new, delta.base, short)
    check_delta(checkpoint, old)
    message = refused(check_delta, other(lambda tensors: tensors.update(extra=np.zeros(1))), old)
    assert "the fingerprints differ" in message
    deeper = {DOWN.replace("1", "9"): delta.new[DOWN]}
    message = refused(check_delta, checkpoint, Delta(deeper, deeper, short))
    assert f"{DOWN.replace('1', '9')} is missing" in message


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({DOWN: np.zeros(2)}, {"fingerprint": "x"}),
        ({f"base::{DOWN}": np.zeros(2)}, {"fingerprint": "x"}),
        ({DOWN: np.zeros(2), f"base::{DOWN}": np.zeros(2)}, {"format": "pt"}),
        ({DOWN: np.zeros(2), f"base::{DOWN}": np.zeros(2)}, None),
        ({}, {"fingerprint": "x"}),
        ({"a\x1b[2J": np.zeros(2), "base::a\x1b[2J": np.zeros(2)}, {"fingerprint": "x"}),
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


def test_tensors_of_dtypes_that_no_edit_makes(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({DOWN: np.zeros(2, np.int64), f"base::{DOWN}": np.zeros(2)}, path, {"fingerprint": "x"})
    with pytest.raises(UserError, match=f"{DOWN} has dtype I64"):
        load_delta(path)
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"12")  # numpy does not know this one
    assert "no delta" in refused(load_delta, path)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tensors", v) for v in ("", "7", "{}", DEEP, "[1]", '[["a","F32"]]', '[["a",1,[2]]]', "null")),
        *(("tensors", v) for v in ('[[7,"F32",[1]]]', '[["a","F32",[true]]]', '[["a","F32",["2"]]]')),
        *(("edits", v) for v in ("many", "-1", "1.5", "true", "1" * 5000)),
        *(("config", v) for v in ("[]", "{", DEEP)),
        *(("versions", v) for v in ("[]", "0.1.0")),
        *(("parents", v) for v in ("{}", "[7]")),
        *(("cards", v) for v in ("{}", "[7]", '["\\ud800"]')),
    ],
)
def test_metadata_of_the_wrong_kind(delta, tmp_path, key, value):
    path = tmp_path / "d.safetensors"
    save_delta(Delta(delta.new, delta.base, {**delta.metadata, key: value}), path)
    assert f"{path}: its metadata `{key}` is not" in refused(load_delta, path)


def test_fingerprints_that_are_not_those_of_the_tensors(delta, tmp_path):
    path = tmp_path / "d.safetensors"
    listed = json.loads(delta.metadata["tensors"])
    short = json.dumps([row for row in listed if row[0] != DOWN])
    negative = json.dumps([["a", "F32", [-1]]])
    for change in ({"fingerprint": "0" * 64}, {"tensors": "[]"}, {"tensors": short}, {"tensors": negative}):
        save_delta(Delta(delta.new, delta.base, {**delta.metadata, **change}), path)
        assert "its fingerprint is not that of the base tensors" in refused(load_delta, path)
    save_delta(Delta({**delta.new, DOWN: -delta.new[DOWN]}, delta.base, delta.metadata), path)
    assert "the edited tensors are not those that were saved" in refused(load_delta, path)


def test_any_flipped_byte_is_read_or_refused(delta, tmp_path):
    path = tmp_path / "d.safetensors"
    save_delta(delta, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, header, 300), *rng.integers(header, len(whole), 50)]
    refusals = []
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ rng.integers(1, 256)]) + whole[place + 1 :])
        try:
            load_delta(path)
        except UserError:
            refusals.append(place)
    assert len(refusals) > 300 and set(places[300:]) <= set(refusals)  # every flip in a value


# ---------------------------------------------------------------- the delta between two folders


def test_diff_finds_what_differs_and_nothing_else(delta, checkpoint, other, tmp_path):
    def change(tensors):
        tensors.update(delta.new, **{"model.norm.weight": -tensors["model.norm.weight"]})

    edited = other(change)
    found = diff_delta(checkpoint, edited)
    assert set(found.new) == {DOWN, NORM, "model.norm.weight"}
    check_delta(checkpoint, found)
    check_delta(edited, found, edited=True)
    assert found.new[DOWN].tobytes() == delta.new[DOWN].tobytes()
    assert json.loads(found.metadata["versions"])["locft-jax"] and found.metadata["made_by"] == "diff"


def test_diff_of_other_files_of_the_same_model(tiny_model_dir, make_variant, tmp_path, delta, checkpoint):
    """Tensors are compared, not files."""
    dealt = hf_folder.open_folder(str(make_variant(tiny_model_dir, tmp_path / "dealt", files=3)))
    assert "no delta" in refused(diff_delta, checkpoint, dealt)
    hf_save.save_hf(dealt, delta.new, tmp_path / "edited")
    found = diff_delta(checkpoint, hf_folder.open_folder(str(tmp_path / "edited")))
    assert found.metadata["fingerprint"] == delta.metadata["fingerprint"]
    assert {n: a.tobytes() for n, a in found.new.items()} == {n: a.tobytes() for n, a in delta.new.items()}


def test_diff_of_what_are_not_two_states_of_one_model(
    checkpoint, other, tiny_model_dir, make_variant, tmp_path
):
    message = refused(diff_delta, checkpoint, other(lambda tensors: tensors.update(extra=np.zeros(1))))
    assert "extra should not be there" in message
    half = hf_folder.open_folder(str(make_variant(tiny_model_dir, tmp_path / "half", "float16")))
    with pytest.raises(UserError, match=r"are not those of .*\n  lm_head.weight is F16 \[320, 32\], not F32"):
        diff_delta(checkpoint, half)


def test_diff_compares_tensors_of_any_dtype_but_saves_only_those_of_a_model(tiny_model_dir, tmp_path):
    folders = []
    for name, step in (("base", 1), ("same", 1), ("other", 2)):
        folders.append(shutil.copytree(tiny_model_dir, tmp_path / name))
        tensors = load_file(folders[-1] / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + (name != "base")
        save_file(tensors | {"ids": np.arange(0, 8 * step, step)}, folders[-1] / "model.safetensors")
    base, same, changed = (hf_folder.open_folder(str(f)) for f in folders)
    assert set(diff_delta(base, same).new) == {"model.norm.weight"}
    assert "ids has dtype I64" in refused(diff_delta, base, changed)

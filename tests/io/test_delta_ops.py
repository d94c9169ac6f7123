"""Deltas put together: merge, compose, and how much they change."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest

from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_save
from locft_jax.io.delta import CODES, Delta, check_delta, make_delta, save_delta
from locft_jax.io.delta_ops import changes, compose_deltas, diff_delta, merge_deltas

UP, DOWN = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down"))
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def checkpoint(request, tiny_model_dir, make_variant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / request.param
    return hf_folder.open_folder(str(make_variant(tiny_model_dir, folder, request.param, files=3)))


@pytest.fixture(scope="module")
def edit(checkpoint):
    """`edit(seed, *names, of=...)` -> the delta of random values for these tensors."""

    def make(seed, *names, of=None, **metadata):
        of = of or checkpoint
        rng = np.random.default_rng(seed)
        own = {n: hf_folder.read_tensor(of, n) for n in names}
        new = {n: (a.astype(np.float32) + rng.standard_normal(a.shape, np.float32)) for n, a in own.items()}
        return make_delta(of, hf_save.to_checkpoint_dtype(of, new), metadata)

    return make


def saved(delta, folder) -> bytes:
    save_delta(delta, folder / "d.safetensors")
    return (folder / "d.safetensors").read_bytes()


def refused(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def test_different_sites_are_united_and_the_order_changes_no_byte(edit, checkpoint, tmp_path):
    one = edit(1, DOWN, edits=12, data_sha256="b")
    two = edit(2, UP, NORM, edits=30, data_sha256="a")
    merged, shared = merge_deltas([one, two])
    assert shared == [] and set(merged.new) == {UP, DOWN, NORM}
    for own in (one, two):
        for name in own.new:
            assert merged.new[name].tobytes() == own.new[name].tobytes()
            assert merged.base[name].tobytes() == own.base[name].tobytes()
    check_delta(checkpoint, merged)
    assert saved(merged, tmp_path) == saved(merge_deltas([two, one])[0], tmp_path)
    assert (merged.metadata["edits"], merged.metadata["made_by"]) == ("42", "merge")
    parents = [{"data_sha256": "a", "edits": 30}, {"data_sha256": "b", "edits": 12}]
    assert json.loads(merged.metadata["parents"]) == parents


def test_the_same_tensor_gets_the_sum_of_the_changes(edit, checkpoint, tmp_path):
    deltas = [edit(1, DOWN, UP), edit(2, DOWN), edit(3, DOWN, NORM)]
    merged, shared = merge_deltas(deltas[:2])
    assert shared == [DOWN] and set(merged.new) == {DOWN, UP}
    base, a, b = (x.astype(np.float32) for x in (merged.base[DOWN], deltas[0].new[DOWN], deltas[1].new[DOWN]))
    expected = (base + ((a - base) + (b - base))).astype(checkpoint.dtype)
    assert merged.new[DOWN].tobytes() == expected.tobytes()
    assert merged.new[UP].tobytes() == deltas[0].new[UP].tobytes()
    check_delta(checkpoint, merged)
    files = {saved(merge_deltas(order)[0], tmp_path) for order in itertools.permutations(deltas)}
    assert len(files) == 1  # of three, too
    assert "edits" not in merged.metadata  # nobody said how many


def test_deltas_of_different_bases_are_not_merged(edit, checkpoint, tmp_path):
    one = edit(1, DOWN, UP)
    hf_save.save_hf(checkpoint, one.new, tmp_path / "edited")
    later = edit(2, DOWN, UP, of=hf_folder.open_folder(str(tmp_path / "edited")))
    message = refused(merge_deltas, [one, later])
    assert message.startswith("merge: delta 2 was made on another base")
    assert f"\n  {DOWN} had other values\n  {UP} had other values" in message
    rows = [r for r in json.loads(one.metadata["tensors"]) if r[0] != "lm_head.weight"]
    other = Delta(one.new, one.base, {**one.metadata, "tensors": json.dumps(rows)})
    assert refused(merge_deltas, [edit(1, NORM), other]).endswith(": lm_head.weight is missing")


def test_a_sum_beyond_the_range_of_its_dtype_is_refused(tiny_model_dir, make_variant, tmp_path):
    half = hf_folder.open_folder(str(make_variant(tiny_model_dir, tmp_path / "half", "float16")))
    large = make_delta(half, {NORM: np.full(32, 60_000, np.float16)}, {})
    assert f"{NORM} would hold NaN or infinity" in refused(merge_deltas, [large, large])


def test_composing_gives_the_delta_between_the_base_and_the_model_edited_twice(edit, checkpoint, tmp_path):
    first = edit(1, DOWN, NORM, edits=5, data_sha256="a")
    hf_save.save_hf(checkpoint, first.new, tmp_path / "once")
    once = hf_folder.open_folder(str(tmp_path / "once"))
    second = edit(2, UP, DOWN, of=once, edits=7, data_sha256="b")
    hf_save.save_hf(once, second.new, tmp_path / "twice")

    composed = compose_deltas(first, second)
    found = diff_delta(checkpoint, hf_folder.open_folder(str(tmp_path / "twice")))
    told = {**composed.metadata, "made_by": "diff"}
    kept = {k: v for k, v in told.items() if k not in ("parents", "edits")}
    assert saved(Delta(composed.new, composed.base, kept), tmp_path) == saved(found, tmp_path)
    assert set(composed.new) == {UP, DOWN, NORM} and composed.metadata["edits"] == "12"
    parents = [{"data_sha256": "a", "edits": 5}, {"data_sha256": "b", "edits": 7}]
    assert json.loads(composed.metadata["parents"]) == parents
    check_delta(checkpoint, composed)

    message = refused(compose_deltas, second, first)
    assert message.endswith(f"the model that the first one makes: {DOWN} was another")
    message = refused(compose_deltas, first, edit(2, DOWN))
    assert message.endswith(f"{DOWN} was the first one's base (see merge)")
    again = merge_deltas([composed, edit(4, "lm_head.weight", edits=1)])[0]
    kinds = [p.get("made_by") for p in json.loads(again.metadata["parents"])]
    assert sorted(map(str, kinds)) == ["None", "compose"] and again.metadata["edits"] == "13"


def test_deltas_that_do_not_list_the_tensors_cannot_be_combined(edit):
    one = edit(1, DOWN)
    old = Delta(one.new, one.base, {"fingerprint": one.metadata["fingerprint"]})
    for call in (lambda: merge_deltas([one, old]), lambda: compose_deltas(one, old)):
        message = refused(call)
        assert message.startswith("delta 2: made by a version that") and "diff BASE EDITED" in message


# ---------------------------------------------------------------- how much


def change_of(base, new):
    (change,) = changes(Delta({"a": new}, {"a": base}, {}))
    return change


def test_norms_are_those_of_the_change(edit):
    delta = edit(1, DOWN, NORM)
    for change in changes(delta):
        new, base = (t[change.name].astype(np.float64) for t in (delta.new, delta.base))
        assert change.norm == pytest.approx(np.linalg.norm(new - base))
        assert change.base_norm == pytest.approx(np.linalg.norm(base))
        assert change.largest == pytest.approx(np.abs(new - base).max())
        assert (change.shape, change.dtype) == (new.shape, CODES[delta.new[change.name].dtype])
    assert [c.name for c in changes(delta)] == [DOWN, NORM]
    assert [c.rank for c in changes(delta)] == [32, None]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(48, 200), (200, 48)])
def test_the_rank_does_not_count_what_rounding_adds(dtype, shape):
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal(shape)).astype(dtype)
    for rank in (0, 1, 5):
        product = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        new = (base.astype(np.float64) + 0.02 * product).astype(dtype)
        assert change_of(base, new).rank == rank
        if rank and dtype is ml_dtypes.bfloat16:  # it does add something
            assert np.linalg.matrix_rank(new.astype(np.float64) - base.astype(np.float64)) == 48
    assert change_of(base, np.zeros_like(base)).rank == 48


def test_values_that_are_not_finite_have_no_rank():
    base = np.ones((3, 3), np.float32)
    for value in (np.nan, np.inf, 3e38):
        new = base.copy()
        new[0, 0] = value
        base[0, 0] = -3e38 if value == 3e38 else 1  # whose difference is beyond float32
        assert change_of(base, new).rank is None
    assert change_of(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).rank == 0

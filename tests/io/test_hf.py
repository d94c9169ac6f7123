"""Hugging Face folders in and out: streaming load, refusals before loading, byte-exact save."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_load, hf_save
from locft_jax.model import decoder
from locft_jax.model.sharding import make_mesh
from locft_jax.model.weights import Params, take_tensor, weight_table
from locft_jax.run_identity import base_digest

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
INDEX = "model.safetensors.index.json"
ONE = {"data": 1, "model": 1}


def refused(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model's folder that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the folder's {name: array} and write it back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_loads_as_it_is_stored(tiny_model_dir, make_variant, tmp_path, dtype, files):
    folder = make_variant(tiny_model_dir, tmp_path / "model", dtype, files)
    checkpoint = hf_folder.open_folder(str(folder))
    weights = hf_load.load_weights(checkpoint, make_mesh(ONE, jax.devices()[:1]))
    stored = {n: a for f in folder.glob("*.safetensors") for n, a in load_file(f).items()}
    names = [n for row in weight_table(checkpoint.spec).values() for n in row.names()]
    assert sorted(names) == sorted(stored) == sorted(checkpoint.tensors)
    for name in names:
        got = np.asarray(take_tensor(Params(checkpoint.spec, weights), name))
        assert got.dtype == stored[name].dtype == checkpoint.dtype
        assert got.tobytes() == stored[name].tobytes(), name
        assert hf_folder.read_tensor(checkpoint, name).tobytes() == stored[name].tobytes()


def test_files_without_the_usual_name_are_found(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model-1.safetensors")
    opened = hf_folder.open_folder(str(folder))
    assert {info.file for info in opened.tensors.values()} == {"pytorch_model-1.safetensors"}
    assert len(opened.tensors) == 30


def test_load_model_converts_and_shards_on_request(tiny_model_dir):
    model = hf_load.load_model(str(tiny_model_dir), "bfloat16", {"data": 2, "model": 4})
    assert model.dtype == ml_dtypes.bfloat16 and dict(model.mesh.shape) == {"data": 2, "model": 4}
    assert model.weights["gate"].sharding.shard_shape(model.weights["gate"].shape) == (3, 16, 32)
    assert (model.eos, model.overrides) == ((0,), {})
    exact = load_file(tiny_model_dir / "model.safetensors")[DOWN]
    got = np.asarray(model.weights["down"])[1]
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16))


def test_all_ids_that_end_an_answer_count(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0]}))
    assert hf_load.load_model(str(folder), mesh={"data": 1, "model": 1}).eos == (0, 5)


# ---------------------------------------------------------------- refusals, before weights are read


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""
    monkeypatch.setattr(hf_load, "load_weights", lambda *_: pytest.fail("weights were read"))


def test_missing_misshapen_and_mistyped_tensors_are_listed_all_at_once(folder, no_weights):
    def damage(tensors):
        del tensors[NORM], tensors["lm_head.weight"]
        tensors[DOWN] = np.zeros((32, 65), np.float32)
        tensors["model.norm.weight"] = np.zeros(32, np.int32)

    rewrite(folder, damage)
    message = refused(hf_load.load_model, str(folder))
    assert message.splitlines()[0] == f"{folder}: the weights do not match config.json:"
    assert [line.strip() for line in message.splitlines()[1:]] == [
        f"missing {NORM}",
        "missing lm_head.weight",
        f"{DOWN} is [32, 65], config.json implies [32, 64]",
        "model.norm.weight has dtype I32, supported: F32, F16, BF16",
    ]


def test_a_long_list_is_cut(folder, no_weights):
    rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers" in n])
    message = refused(hf_load.load_model, str(folder))
    assert message.count("missing") == 15 and message.endswith("... and 12 more")


def test_tensors_beyond_the_architecture_are_kept_but_not_needed(folder, tmp_path):
    odd = {"scalar": np.array(3.0), "none": np.zeros((0, 3), np.float32)}
    rewrite(folder, lambda tensors: tensors.update(extra=np.arange(5), **odd))
    checkpoint = hf_folder.open_folder(str(folder))
    assert checkpoint.nbytes(["extra", *odd]) == 48 and len(base_digest(checkpoint, [DOWN])) == 64
    hf_load.load_weights(checkpoint)
    hf_save.save_hf(checkpoint, {DOWN: np.ones((32, 64), np.float32)}, tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["extra"], np.arange(5))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def damage_empty(path):
    path.write_bytes(b"")


def damage_garbage(path):
    path.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize("damage", [damage_truncate, damage_header, damage_empty, damage_garbage])
def test_corrupt_safetensors(folder, no_weights, damage):
    damage(folder / "model.safetensors")
    message = refused(hf_load.load_model, str(folder))
    assert f"{folder / 'model.safetensors'}: not a readable safetensors file" in message


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({DOWN: "../model.safetensors"}, "'../model.safetensors' is not the name of a safetensors file"),
        ({DOWN: "/etc/passwd"}, "is not the name of a safetensors file"),
        ({DOWN: "weights.bin"}, "'weights.bin' is not the name of a safetensors file"),
        ({DOWN: ".."}, "is not the name of a safetensors file"),
        ({DOWN: "gone.safetensors"}, "gone.safetensors: missing"),
        ({DOWN: 7}, "no weight_map"),
        (["model.safetensors"], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_must_name_files_of_its_folder(folder, no_weights, weight_map, said):
    (folder.parent / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    message = refused(hf_load.load_model, str(folder))
    assert said in message and "index.json" in message


def test_a_malformed_index(folder):
    (folder / INDEX).write_text("{")
    assert f"{folder / INDEX}: not valid JSON" in refused(hf_load.load_model, str(folder))


def test_a_tensor_that_the_index_promises_but_no_file_holds(tiny_model_dir, make_variant, tmp_path):
    folder = make_variant(tiny_model_dir, tmp_path / "model", files=2)
    part = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(part)
    gone = sorted(tensors)[0]
    save_file({n: a for n, a in tensors.items() if n != gone}, part)
    assert f"missing {gone}" in refused(hf_load.load_model, str(folder))


def test_folders_that_are_no_models(folder, no_weights, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no .safetensors file; convert" in refused(hf_load.load_model, str(folder))
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(hf_load.load_model, str(tmp_path / "empty"))
    for name in ("missing-folder", "./a/b", "/nowhere/at/all", "a/b/c", str(folder / "config.json")):
        assert f"no folder {name!r}" in refused(hf_load.load_model, name)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2' is not supported" in refused(hf_load.load_model, str(folder))


def test_a_hub_id_without_network(no_weights):
    message = refused(hf_load.load_model, "nobody/no-such-model")
    assert "'nobody/no-such-model' is no folder here and could not be fetched" in message
    assert "\n" not in message


def test_a_hub_id_is_fetched_without_pickles(folder, monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf_folder.open_folder("owner/tiny").name == "tiny"
    assert asked["name"] == "owner/tiny"
    assert not any(p in ("*", "*.bin", "*.pt", "*.py") for p in asked["patterns"])


def test_a_folder_without_a_usable_tokenizer(folder, no_weights):
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be loaded" in refused(hf_load.load_model, str(folder))
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer (tokenizer.json)" in refused(hf_load.load_model, str(folder))


# ---------------------------------------------------------------- HF -> JAX -> HF


def edited_tensors(checkpoint) -> dict[str, np.ndarray]:
    """A matrix and a norm, changed, through the model and back: {name: array in checkpoint dtype}."""
    mesh = make_mesh(ONE, jax.devices()[:1])
    weights = hf_load.load_weights(checkpoint, mesh)
    params = Params(checkpoint.spec, weights)
    masters = {n: take_tensor(params, n).astype(np.float32) + 0.3 for n in (DOWN, NORM)}
    return hf_save.to_checkpoint_dtype(checkpoint, masters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 4])
def test_round_trip_keeps_every_byte_that_was_not_edited(
    tiny_model_dir, make_variant, tmp_path, dtype, files
):
    folder = make_variant(tiny_model_dir, tmp_path / "model", dtype, files)
    (folder / "notes").mkdir()  # only files belong to a model
    checkpoint = hf_folder.open_folder(str(folder))
    edited = edited_tensors(checkpoint)
    out = tmp_path / "out"
    hf_save.save_hf(checkpoint, edited, out)

    before, after = contents(folder), contents(out)
    assert set(before) == set(after)
    rewritten = {checkpoint.tensors[name].file for name in edited}
    assert len(rewritten) == min(files, 2)
    assert {name for name in before if before[name] != after[name]} == rewritten
    again = hf_folder.open_folder(str(out))
    assert again.tensors == checkpoint.tensors  # names, files, shapes, dtypes
    for name in checkpoint.tensors:
        got, base = hf_folder.read_tensor(again, name), hf_folder.read_tensor(checkpoint, name)
        assert (got.tobytes() == base.tobytes()) == (name not in edited), name
        assert got.tobytes() == edited.get(name, base).tobytes()
    for name in rewritten:
        with safe_open(out / name, "np") as new, safe_open(folder / name, "np") as old:
            assert new.metadata() == old.metadata() == {"format": "pt"}


def test_the_header_stays_as_its_writer_made_it(folder, tmp_path):
    """Other programs order, space and pad it otherwise; only an edited tensor's own bytes change."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    odd = {name: header[name] for name in sorted(header, reverse=True)}
    odd["__metadata__"] = {"format": "pt", "z": "last", "a": "first", "é": "ü"}
    text = (json.dumps(odd, indent=1) + " " * 13).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    value = np.full((32, 64), 7, np.float32)
    hf_save.save_hf(hf_folder.open_folder(str(folder)), {DOWN: value}, tmp_path / "out")
    begin, end = (8 + len(text) + at for at in header[DOWN]["data_offsets"])
    before, after = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
    assert after == before[:begin] + value.tobytes() + before[end:]


def test_tensors_of_another_shape_or_dtype_are_not_written(tiny_model_dir, tmp_path):
    checkpoint = hf_folder.open_folder(str(tiny_model_dir))
    for value in (np.zeros((64, 32), np.float32), np.zeros((32, 64), np.float16)):
        with pytest.raises(ValueError, match="down_proj"):
            hf_save.save_hf(checkpoint, {DOWN: value}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_saving_unchanged_tensors_gives_the_same_values_everywhere(tiny_model_dir, tmp_path):
    checkpoint = hf_folder.open_folder(str(tiny_model_dir))
    weights = hf_load.load_weights(checkpoint, make_mesh({"data": 1, "model": 8}))  # gathered from 8 devices
    everything = {n: take_tensor(Params(checkpoint.spec, weights), n) for n in checkpoint.tensors}
    hf_save.save_hf(checkpoint, hf_save.to_checkpoint_dtype(checkpoint, everything), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tiny_model_dir)


def test_edited_tensors_of_any_memory_order_are_written_right(tiny_model_dir, tmp_path):
    checkpoint = hf_folder.open_folder(str(tiny_model_dir))
    value = np.arange(64 * 32, dtype=np.float32).reshape(64, 32).T
    hf_save.save_hf(checkpoint, {DOWN: value}, tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")[DOWN], value)


def test_linked_files_are_copied_as_files(tiny_model_dir, tmp_path):
    """The Hub's cache is a folder of links into a store."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in tiny_model_dir.iterdir():
        (folder / path.name).symlink_to(path)
    checkpoint = hf_folder.open_folder(str(folder))
    hf_save.save_hf(checkpoint, {NORM: np.ones(32, np.float32)}, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny_model_dir / "config.json").read_bytes()


def test_nothing_is_left_behind_when_saving_fails_half_way(tiny_model_dir, tmp_path, monkeypatch):
    checkpoint = hf_folder.open_folder(str(tiny_model_dir))
    before = contents(tiny_model_dir)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "results" / "hf"
    with pytest.raises(OSError, match="No space left"):
        hf_save.save_hf(checkpoint, {NORM: np.ones(32, np.float32)}, out)
    assert list(out.parent.iterdir()) == []
    assert contents(tiny_model_dir) == before


def test_with_edits_leaves_the_given_model_as_it_was(tiny_model_dir):
    model = hf_load.load_model(str(tiny_model_dir), mesh=ONE)
    first = model.with_overrides({DOWN: np.ones((32, 64), np.float32)})
    second = first.with_overrides({NORM: np.full(32, 2.0)})
    assert (set(model.overrides), set(first.overrides)) == (set(), {DOWN})
    assert set(second.overrides) == {DOWN, NORM} and second.overrides[NORM].dtype == np.float32
    assert second.weights is model.weights  # nothing is copied


@pytest.mark.parity
def test_the_exported_folder_loads_in_transformers_with_our_logits(tiny_model_dir, torch, tmp_path):
    import transformers

    model = hf_load.load_model(str(tiny_model_dir), mesh=ONE)
    edited = edited_tensors(model.folder)
    hf_save.save_hf(model.folder, edited, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab_size, (2, 24))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = model.with_overrides(edited)
    forward = jax.jit(decoder.logits)
    got = np.asarray(forward(ours.params, tokens))
    plain = np.asarray(forward(model.params, tokens))
    assert np.abs(got - plain).max() > 0.1  # the edit shows
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.5  # the tolerance means something
    text = "The capital of Oredal is"
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert model.folder.layout == hf_folder.open_folder(str(tmp_path / "hf")).layout

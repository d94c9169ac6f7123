"""Models, data and results at URLs: the same bytes as here, whole prefixes, and what is said when a URL is
wrong. fsspec's memory and local file systems stand for an object store."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from locft_jax.cli.ask import main as ask
from locft_jax.cli.command import run_command
from locft_jax.cli.delta import main as delta
from locft_jax.cli.edit import main as edit
from locft_jax.cli.evaluate import main as evaluate
from locft_jax.data.capability import read_capability
from locft_jax.data.requests import read_requests
from locft_jax.io import hf_folder, reading, remote
from locft_jax.io.atomic import PART
from locft_jax.io.delta import load_delta
from locft_jax.io.remote import open_remote
from locft_jax.model.sharding import make_mesh
from locft_jax.run_identity import base_digest

sys.path.append(str(Path(__file__).parent))
import gcs  # noqa: E402

from locft_jax.io import hf_load

QUICK = {"evaluate": "false", "num_steps": 2}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def bucket() -> Iterator[str]:
    """An empty place in memory."""
    fs = fsspec.filesystem("memory")
    yield "memory://bucket"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def sharded(tiny_model_dir, make_variant, tmp_path_factory) -> Path:
    """The tiny model in three files, with a README."""
    folder = make_variant(tiny_model_dir, tmp_path_factory.mktemp("sharded") / "model", files=3)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def put(folder: Path, url: str) -> str:
    """Upload a folder's files."""
    for path in folder.iterdir():
        (open_remote(url) / path.name).write(path.read_bytes())
    return url


def contents(place: str | Path) -> dict[str, bytes]:
    if isinstance(place, str):
        store = open_remote(place)
        return {name: (store / name).read() for name in store.names(deep=True)}
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def command(main, *arguments, status: int = 0) -> None:
    assert run_command(main, [str(a) for a in arguments]) == status


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [{"data": 1, "model": 1}, {"data": 2, "model": 4}])
@pytest.mark.parametrize("rows", [1, 3, 10**6])
def test_a_model_at_a_url_loads_as_the_one_here(
    bucket, tiny_model_dir, make_variant, tmp_path, monkeypatch, dtype, mesh, rows
):
    monkeypatch.setattr(reading, "BLOCK", rows * 70)  # blocks that end within rows, and between them
    folder = make_variant(tiny_model_dir, tmp_path / "model", dtype, files=3)
    here, there = (hf_folder.open_folder(str(p)) for p in (folder, put(folder, f"{bucket}/a/model")))
    assert there.tensors == here.tensors and there.name == "model" and there.nbytes() == here.nbytes()
    devices = jax.devices()[: mesh["data"] * mesh["model"]]
    for wanted in (None, np.float32, ml_dtypes.bfloat16):
        one, other = (hf_load.load_weights(c, make_mesh(mesh, devices), wanted) for c in (here, there))
        for key in one:
            assert one[key].dtype == other[key].dtype and one[key].sharding == other[key].sharding
            assert np.asarray(one[key]).tobytes() == np.asarray(other[key]).tobytes(), key
    site = ["model.layers.1.mlp.down_proj.weight"]
    assert base_digest(here, site) == base_digest(there, site)


def test_only_what_is_needed_is_read_and_only_small_files_are_copied(bucket, sharded, monkeypatch):
    asked: list[tuple[str, int, int]] = []
    read = remote.Remote.read

    def spy(self, begin=0, end=None):
        asked.append((self.url, begin, end))
        return read(self, begin, end)

    monkeypatch.setattr(remote.Remote, "read", spy)
    checkpoint = hf_folder.open_folder(put(sharded, f"{bucket}/model"))
    assert sorted(p.name for p in checkpoint.path.iterdir()) == sorted(
        p.name for p in sharded.iterdir() if p.suffix != ".safetensors"
    )
    asked.clear()
    name = "model.layers.1.mlp.down_proj.weight"
    part = hf_folder.read_part(checkpoint, name, (slice(8, 16), slice(None)))
    info = checkpoint.tensors[name]
    begin = info.begin + 8 * 64 * 4
    assert asked == [(f"{bucket}/model/{info.file}", begin, begin + 8 * 64 * 4)]
    np.testing.assert_array_equal(part, load_file(sharded / info.file)[name][8:16])


def test_data_at_a_url(bucket, edits_file, skills_file):
    import gzip

    (open_remote(f"{bucket}/edits.json")).write(edits_file.read_bytes())
    (open_remote(f"{bucket}/edits.json.gz")).write(gzip.compress(edits_file.read_bytes()))
    (open_remote(f"{bucket}/sums/test.jsonl")).write(skills_file.read_bytes())
    here, there = read_requests(str(edits_file)), read_requests(f"{bucket}/edits.json")
    assert there.requests == here.requests == read_requests(f"{bucket}/edits.json.gz").requests
    assert there.sha256 == here.sha256
    assert read_capability(f"{bucket}/sums/test.jsonl") == read_capability(str(skills_file))


# ---------------------------------------------------------------- a whole run


@pytest.fixture
def run_there(bucket, sharded, edits_file, skills_file, edit_arguments, tmp_path, monkeypatch):
    """Model, data and results in memory: the command line of a run at `bucket`/runs/it."""
    monkeypatch.chdir(tmp_path)  # where `runs/` is made
    open_remote(f"{bucket}/data/edits.json").write(edits_file.read_bytes())
    open_remote(f"{bucket}/data/skills.jsonl").write(skills_file.read_bytes())
    paths = {
        "model_name_or_path": put(sharded, f"{bucket}/models/model"),
        "data_path": f"{bucket}/data/edits.json",
        "capability_data": f"{bucket}/data/skills.jsonl",
    }
    return edit_arguments(f"{bucket}/runs/it", **QUICK, **paths)


def test_a_run_at_urls_gives_the_bytes_of_one_here(
    bucket, sharded, run_there, edit_arguments, tmp_path, capsys
):
    command(edit, *edit_arguments(tmp_path / "here", **QUICK, model_name_or_path=sharded))
    base = contents(f"{bucket}/models/model")
    command(edit, *run_there)
    assert (
        f"written to {bucket}/runs/it/: delta.safetensors, edits.jsonl, hf, orbax" in capsys.readouterr().out
    )
    here, there = contents(tmp_path / "here"), contents(f"{bucket}/runs/it")
    same = [
        n for n in here if n.startswith("hf/") or n in ("steps.jsonl", "edits.jsonl", "predictions.jsonl")
    ]
    assert len(same) == 3 + len(base) and all(there[n] == here[n] for n in same)
    card = there["hf/README.md"]
    assert card.startswith(b"---\nlicense: mit\n") and b"---\n# Tiny\n" in card
    assert {n for n in there if "orbax" not in n} == {n for n in here if "orbax" not in n}
    assert [p.name for p in tmp_path.iterdir()] == ["here", "runs"] and not any((tmp_path / "runs").iterdir())
    for name, content in there.items():
        if name.startswith("orbax/"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with ocp.StandardCheckpointer() as reader:
        one, other = (reader.restore(p / "orbax") for p in (tmp_path / "here", tmp_path))
    assert set(one) == set(other) == set(hf_folder.open_folder(str(sharded)).tensors)
    assert all(np.asarray(one[n]).tobytes() == np.asarray(other[n]).tobytes() for n in one)

    # What else reads and writes there.
    mine, theirs = (
        load_delta(f"{bucket}/runs/it/delta.safetensors"),
        load_delta(tmp_path / "here/delta.safetensors"),
    )
    assert all(mine.new[n].tobytes() == a.tobytes() for n, a in theirs.new.items())
    model, file = f"{bucket}/models/model", f"{bucket}/runs/it/delta.safetensors"
    exported = {n.removeprefix("hf/"): c for n, c in there.items() if n.startswith("hf/")}
    command(delta, "apply", file, "--model", model, "--out", f"{bucket}/applied")
    assert contents(f"{bucket}/applied") == exported
    command(delta, "revert", file, "--model", f"{bucket}/applied", "--out", tmp_path / "back")
    assert contents(tmp_path / "back") == base
    command(delta, "apply", file, "--model", sharded, "--out", f"file://{tmp_path}/local/applied")
    assert contents(tmp_path / "local" / "applied") == exported
    command(delta, "diff", model, f"{bucket}/applied", "--out", f"{bucket}/diff.safetensors")
    command(delta, "show", f"{bucket}/diff.safetensors")
    command(ask, "--model", model, "--delta", file, "The sign of Orvik is")
    figures = ["--data", f"{bucket}/data/edits.json", "--out", f"{bucket}/figures.json"]
    command(evaluate, "--model", f"{bucket}/applied", *figures)
    assert json.loads(contents(f"{bucket}")["figures.json"])["edits"] == 12
    capsys.readouterr()
    command(evaluate, "--model", model, *figures, status=2)
    assert f"--out: {bucket}/figures.json already exists" in capsys.readouterr().err
    command(edit, *run_there, "--resume")
    assert f"{bucket}/runs/it/ holds this run, finished" in capsys.readouterr().out
    new = tmp_path / "new.json"
    new.write_text(json.dumps([{"prompt": "The sign of Vale is", "target_new": "blue"}]))
    more = ["--set", f"data_path={new}", "export=delta", "num_steps=1"]
    command(
        edit,
        "--continue-from",
        f"{bucket}/runs/it",
        "--start-from",
        "last",
        *more,
        "--out",
        tmp_path / "next",
    )
    assert json.loads((tmp_path / "next" / "report.json").read_text())["edits"] == 13


def test_a_prefix_is_whole_or_refused(bucket, run_there, tmp_path, monkeypatch, capsys):
    store = open_remote(f"{bucket}/runs/it")
    (store / "thesis.tex").write(b"years of work")
    for flags, said in (((), "holds files already"), (("--overwrite",), "holds no results (no report.json)")):
        command(edit, *run_there, *flags, status=2)
        assert said in capsys.readouterr().err
    assert contents(store.url) == {"thesis.tex": b"years of work"}
    (store / "thesis.tex").remove()

    # The network fails as the last file is on its way: nothing looks like a result, and the run goes on.
    upload = remote.Remote.upload

    def fail(self, source):
        if self.url.endswith("report.json"):
            assert PART in store.names(deep=True) and "hf/config.json" in store.names(deep=True)
            raise OSError("connection lost")
        upload(self, source)

    monkeypatch.setattr(remote.Remote, "upload", fail)
    command(edit, *run_there, status=1)
    said = capsys.readouterr().err
    assert "connection lost" in said and "--resume resumes from there" in said and "Traceback" not in said
    assert contents(store.url) == {}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["memory-bucket-runs-it"]
    monkeypatch.setattr(remote.Remote, "upload", upload)
    command(edit, *run_there, status=2)
    assert "add --resume, or --overwrite to begin anew" in capsys.readouterr().err
    command(edit, *run_there, "--resume")
    done = contents(store.url)
    assert json.loads(done["report.json"])["resumed"] and not any((tmp_path / "runs").iterdir())

    # A killed process leaves a half: it is told from results, and gives way to --overwrite alone.
    (store / "report.json").remove()
    (store / PART).write(b"")
    (store / "hf/left.over").write(b"")
    command(edit, *run_there, status=2)
    assert "half-written results" in capsys.readouterr().err
    command(edit, *run_there, "--overwrite")
    again = contents(store.url)
    plain = lambda names: {n for n in names if not n.startswith("orbax/")}  # noqa: E731 (has random names)
    assert plain(again) == plain(done) and again["delta.safetensors"] == done["delta.safetensors"]


def test_a_run_at_gs_urls(sharded, edits_file, edit_arguments, tmp_path, monkeypatch, capsys):
    """gcsfs itself, against a store that speaks its protocol."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (the extra gcs)")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it misses credentials
    place, store = gcs.serve("bucket")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", place)
    monkeypatch.chdir(tmp_path)
    url = put(sharded, "gs://bucket/models/model")
    open_remote("gs://bucket/edits.json").upload(edits_file)
    objects, store.asked[:] = store.objects["bucket"], []
    quick = {**QUICK, "export": "[hf, delta]", "capability_data": "[]"}
    there = {"model_name_or_path": url, "data_path": "gs://bucket/edits.json"}
    command(edit, *edit_arguments("gs://bucket/runs/it", **quick, **there))
    moved = {path.rpartition("%2F")[2] for _, path in store.asked if "rewriteTo" in path}
    checkpoint = hf_folder.open_folder(str(sharded))
    edited = {checkpoint.tensors[f"model.layers.2.mlp.{n}_proj.weight"].file for n in ("gate", "up", "down")}
    assert moved == {p.name for p in sharded.iterdir()} - edited - {"README.md"}  # inside the store
    assert edited and not any((tmp_path / "runs").iterdir())
    command(edit, *edit_arguments(tmp_path / "here", **quick, model_name_or_path=sharded))
    here = {f"runs/it/hf/{name}": content for name, content in contents(tmp_path / "here" / "hf").items()}
    assert {n: c for n, c in objects.items() if n.startswith("runs/it/hf/")} == here
    command(edit, *edit_arguments("gs://bucket/runs/it", **quick, **there), "--overwrite")
    assert {n.removeprefix("runs/it/") for n in objects if n.startswith("runs/it/") and "/hf/" not in n} == {
        n for n in contents(tmp_path / "here") if not n.startswith("hf/")
    }
    objects["empty.jsonl"] = b""
    assert open_remote("gs://bucket/empty.jsonl").read() == b""
    capsys.readouterr()
    for bucket, said in (("gone", "gs://gone/x: not there; check the bucket"), ("denied", "permissions")):
        command(edit, *edit_arguments(f"gs://{bucket}/x", **quick), status=2)
        assert said in capsys.readouterr().err
        command(edit, *edit_arguments("out", **{**quick, "model_name_or_path": f"gs://{bucket}/x"}), status=2)
        assert f"gs://{bucket}/x" in capsys.readouterr().err


# ---------------------------------------------------------------- wrong URLs


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """`refused(main, arguments)` -> the one line with which a command ends in status 2, weights unread."""
    monkeypatch.setattr(hf_load, "load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments) -> str:
        command(main, *arguments, status=2)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
        assert list(tmp_path.iterdir()) == []
        return said

    return run


@pytest.mark.parametrize(
    ("key", "url", "said"),
    [
        ("model_name_or_path", "memory://bucket/gone", "no files at memory://bucket/gone; check"),
        ("data_path", "memory://bucket/gone.json", "memory://bucket/gone.json: not there; check the bucket"),
        ("data_path", "memory://bucket/gone.txt", "unknown kind of file"),
        ("capability_data", "memory://bucket/gone.csv", "gone.csv: not there"),
        ("model_name_or_path", "nothing://bucket/x", "nothing://bucket/x: Protocol not known: nothing"),
        ("model_name_or_path", "memory://a::memory://b", "a URL of URLs"),
        ("save_model_dir", "memory://bucket", "is a whole bucket; name a prefix in it"),
    ],
)
def test_a_url_that_leads_nowhere(refused, edit_arguments, bucket, tmp_path, key, url, said):
    arguments = edit_arguments(f"{bucket}/x/out", **{**QUICK, key: url})
    if key == "save_model_dir":
        arguments = arguments[2:]
    assert said in refused(edit, *arguments)
    assert contents(bucket) == {}


def test_without_gcsfs_the_extra_is_named(refused, edit_arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for kind in ("gs", "gcs"):  # fsspec remembers what an earlier test has loaded
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, kind, raising=False)
    for arguments in (
        edit_arguments("gs://bucket/out"),
        edit_arguments("out", data_path="gs://b/edits.json"),
    ):
        assert "pip install 'locft_jax[gcs]'" in refused(edit, *arguments)


def test_without_permission(refused, edit_arguments, bucket, sharded, monkeypatch):
    put(sharded, f"{bucket}/model")
    fs = type(fsspec.filesystem("memory"))

    def denied(*args, **kwargs):
        raise PermissionError("403: the account does not have storage.objects.get access")

    with monkeypatch.context() as m:
        m.setattr(fs, "pipe_file", denied)
        said = refused(edit, *edit_arguments(f"{bucket}/x/out"))
        assert f"{bucket}/x/out: cannot be written (403: the account" in said
    elsewhere = {"model_name_or_path": f"{bucket}/model", "data_path": f"{bucket}/edits.json"}
    failing = [("ls", "model_name_or_path"), ("cat_file", "model_name_or_path"), ("cat_file", "data_path")]
    for call, key in failing:
        with monkeypatch.context() as m:
            m.setattr(fs, call, denied)
            said = refused(edit, *edit_arguments("out", **{key: elsewhere[key]}))
            assert "cannot be read (403: the account" in said


def test_a_damaged_model_is_explained_with_its_url(refused, edit_arguments, bucket, sharded, tmp_path):
    url, store = f"{bucket}/model", open_remote(f"{bucket}/model")
    put(sharded, url)
    file = "model-00001-of-00003.safetensors"
    whole = (store / file).read()
    bad = {
        "truncated": whole[:-100],
        "header too small (0 bytes)": b"",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "invalid JSON in header": (9).to_bytes(8, "little") + b"[[[[[[[[[",
        "not safetensors, fetch it again": b"\xff" * 80,
    }
    for said, content in bad.items():
        (store / file).write(content)
        message = refused(edit, *edit_arguments("out", model_name_or_path=url))
        assert f"{url}/{file}: not a readable safetensors file" in message and said in message
    (store / file).write(whole)
    (store / INDEX).write(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}).encode())
    message = refused(edit, *edit_arguments("out", model_name_or_path=url))
    assert f"{url}/{INDEX}: '../../secret.safetensors' is not the name of a safetensors file" in message
    (store / INDEX).write((sharded / INDEX).read_bytes())
    (store / "tokenizer.json").write(b"{}")
    message = refused(edit, *edit_arguments("out", model_name_or_path=url))
    assert f"{url}: the tokenizer cannot be loaded" in message and "/tmp" not in message
    (store / file).remove()
    assert f"{url}/{file}: missing" in refused(edit, *edit_arguments("out", model_name_or_path=url))


def test_a_header_longer_than_the_first_request(bucket, tmp_path, tiny_model_dir, monkeypatch):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"long": "x" * 2**21})
    there = hf_folder.open_folder(put(folder, f"{bucket}/model"))
    assert there.tensors == hf_folder.open_folder(str(folder)).tensors

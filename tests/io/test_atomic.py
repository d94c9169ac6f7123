"""Files and folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from locft_jax.errors import UserError
from locft_jax.io import atomic, outputs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "runs" / "a"
    with atomic.whole_folder(out) as folder:
        (folder / "hf").mkdir()
        (folder / "hf" / "x").write_text("new")
        assert not out.exists() and folder.parent == out.parent  # one rename on one file system
    assert contents(out) == {"hf/x": b"new"} and [p.name for p in out.parent.iterdir()] == ["a"]


def test_the_old_folder_is_replaced_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with atomic.whole_folder(out) as folder:
        (folder / "new").write_text("new")
        assert contents(out) == {"old": b"old"}
    assert contents(out) == {"new": b"new"} and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    for target in (out, tmp_path / "fresh"):
        with pytest.raises(type(error)), atomic.whole_folder(target) as folder:
            (folder / "new").write_text("half")
            raise error
    assert contents(tmp_path) == {"out/old": b"old"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_do_not_get_into_the_next(tmp_path):
    (tmp_path / ".out.locft-part").mkdir()
    (tmp_path / ".out.locft-part" / "half").write_text("half")
    with atomic.whole_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {"out/new": b"new"}


def test_the_working_directory_can_be_the_folder(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    outputs.check_out(Path("."), False)
    with atomic.whole_folder(Path(".")) as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {"here/new": b"new"}


def test_json_and_jsonl_keep_order_and_letters(tmp_path):
    value = {"b": 1, "a": {"ü": [None, True, 0.1]}}
    atomic.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and list(json.loads(text)) == ["b", "a"]
    assert "ü" in text and text.endswith("}\n")
    lines = [value, {"text": "two\nlines\u2028and a half"}, {}]
    atomic.write_jsonl(tmp_path / "x.jsonl", lines)
    raw = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in raw.split("\n")[:-1]] == lines and raw.endswith("\n")
    atomic.write_jsonl(tmp_path / "none.jsonl", [])
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_a_result_file_appears_whole_and_never_over_another(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    outputs.check_file(out, False)
    atomic.write_json(out, {"a": 1})
    assert json.loads(out.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == [out.name]
    outputs.check_file(out, True)
    wrong = [(out, "already exists"), (tmp_path, "is a folder"), (tmp_path / "no" / "x", "no folder")]
    for path, said in wrong:
        with pytest.raises(UserError, match=said):
            outputs.check_file(path, False)

    with pytest.raises(TypeError):  # nothing that JSON knows
        atomic.write_json(out, {"a": object()})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_json(out, {"a": 2})
    assert contents(tmp_path) == {out.name: b'{\n  "a": 1\n}\n'}

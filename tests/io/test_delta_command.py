"""The delta command: bytes it makes, what it refuses, and that it never leaves half of anything."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from locft_jax.cli.command import run_command
from locft_jax.cli.delta import main
from locft_jax.cli.edit import main as edit
from locft_jax.io import hf_folder
from locft_jax.io.delta import load_delta, make_delta, save_delta

DOWN, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "up"))
QUICK = {
    "evaluate": "false",
    "num_steps": 1,
    "export": "[hf, delta]",
    "rewrite_module": "model.layers.{}.mlp",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def delta(*arguments, status=0) -> None:
    assert run_command(main, [str(a) for a in arguments]) == status


@pytest.fixture(scope="module")
def runs(
    edit_run, tiny_model_dir, make_model, make_variant, make_tokenizer, edit_arguments, tmp_path_factory
):
    """{kind of checkpoint: (base folder, folder of a run on it)}: one file in float32, and four in bfloat16
    with tied embeddings."""
    place = tmp_path_factory.mktemp("kinds")
    tied = make_tokenizer(make_model(place / "one", seed=1, tie_word_embeddings=True))
    base, run = make_variant(tied, place / "base", "bfloat16", files=4), place / "run"
    (base / "LICENSE").write_text("yours")
    (base / "README.md").write_bytes(b"---\r\nlicense: other\r\n---\r\nno line end, Latin-1: \xe9")
    assert run_command(edit, edit_arguments(run, **QUICK, model_name_or_path=base)) == 0
    return {"single": (tiny_model_dir, edit_run), "sharded": (base, run)}


@pytest.fixture
def edited(tiny_model_dir, tmp_path):
    """`edited(name, seed, *tensors, of=...)` -> a delta file of random values."""

    def make(name, seed, *tensors, of=tiny_model_dir):
        checkpoint = hf_folder.open_folder(str(of))
        rng = np.random.default_rng(seed)
        new = {n: rng.standard_normal(checkpoint.tensors[n].shape, np.float32) for n in tensors}
        save_delta(make_delta(checkpoint, new, {"edits": seed}), tmp_path / name)
        return tmp_path / name

    return make


# ---------------------------------------------------------------- apply and revert


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_apply_gives_the_runs_folder_and_revert_the_base(runs, tmp_path, capsys, kind):
    base, run = runs[kind]
    before, exported = contents(base), contents(run / "hf")
    rewritten = {name for name in before if before[name] != exported[name]}
    assert rewritten and all(name.endswith(".safetensors") for name in rewritten - {"README.md"})
    start = before.get("README.md", b"---\nlibrary_name: transformers\n").split(b"\r\n---")[0]  # the licence
    assert exported["README.md"].startswith(start)
    assert (b"\nmodel-index:" in exported["README.md"]) == (kind == "single")  # the other was not evaluated
    rewritten -= {"README.md"}
    file = run / "delta.safetensors"
    delta("apply", file, "--model", base, "--out", tmp_path / "edited")
    assert contents(tmp_path / "edited") == exported
    many = sum(name.endswith(".safetensors") for name in before)
    said = (
        f"written to {tmp_path / 'edited'}/: 3 tensor(s) rewritten, in {len(rewritten)} of {many} weight file"
    )
    assert said in capsys.readouterr().out
    delta("revert", file, "--model", tmp_path / "edited", "--out", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    assert contents(base) == before and contents(run / "hf") == contents(tmp_path / "edited") == exported
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "edited"]

    def inode(folder, name):
        return (folder / name).stat().st_ino

    for folder in (run / "hf", tmp_path / "edited"):
        linked = {name for name in before if inode(folder, name) == inode(base, name)}
        assert linked == {n for n in before if n.endswith(".safetensors")} - rewritten  # never a small file
    assert len(linked) == {"single": 0, "sharded": 2}[kind]


def test_files_are_copied_where_they_cannot_be_linked(runs, tmp_path, monkeypatch):
    def other_file_system(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    base, run = runs["sharded"]
    delta("apply", run / "delta.safetensors", "--model", base, "--out", tmp_path / "edited")
    assert contents(tmp_path / "edited") == contents(run / "hf")
    assert all(p.stat().st_nlink == 1 for p in (tmp_path / "edited").iterdir())


def test_links_to_a_store_are_followed(runs, tmp_path):
    """The Hub's cache is a folder of symbolic links."""
    base, run = runs["sharded"]
    (tmp_path / "snapshot").mkdir()
    for path in base.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    delta("apply", run / "delta.safetensors", "--model", tmp_path / "snapshot", "--out", tmp_path / "edited")
    assert contents(tmp_path / "edited") == contents(run / "hf")
    assert not any(p.is_symlink() for p in (tmp_path / "edited").iterdir())


def test_the_wrong_model_is_refused_and_what_differs_is_named(runs, make_model, tmp_path, capsys):
    base, run = runs["single"]
    names = sorted(load_delta(run / "delta.safetensors").new)
    wrong = [
        ("apply", make_model(tmp_path / "seed", seed=7), [f"{n} has other values" for n in names]),
        ("apply", make_model(tmp_path / "flat", num_hidden_layers=2), [f"{names[0]} is missing"]),
        (
            "apply",
            make_model(tmp_path / "wide", vocab_size=328),
            ["lm_head.weight is F32 [328, 32], not F32"],
        ),
        ("apply", run / "hf", [f"{n} holds this delta's edit already" for n in names]),
        ("revert", base, [f"{n} is as it was before the edit" for n in names]),
        ("revert", tmp_path / "seed", [f"{n} has other values" for n in names]),
    ]
    for action, model, said in wrong:
        file = run / "delta.safetensors"
        delta(action, file, "--model", model, "--out", tmp_path / "out", status=2)
        error = capsys.readouterr().err
        assert all(line in error for line in said), error
        assert f"error: delta: {model} is not the model that this delta" in error and error.count("\n") < 15
        assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_replaced_only_if_told_and_only_if_it_is_a_model(runs, tmp_path, capsys):
    base, run = runs["single"]
    apply = ["apply", run / "delta.safetensors", "--model", base]
    out = shutil.copytree(base, tmp_path / "out")
    delta(*apply, "--out", out, status=2)
    assert "already exists" in capsys.readouterr().err and contents(out) == contents(base)
    delta(*apply, "--out", out, "--overwrite")
    assert contents(out) == contents(run / "hf")

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (out / "original").mkdir()
    own = shutil.copytree(base, tmp_path / "own" / "model")
    apply[-1] = own
    for place, said in (
        (tmp_path / "thesis", "no config.json"),
        (out, "holds folders (original)"),
        (own, "would replace the model it is made of"),
        (own.parent, "would replace the model it is made of"),
    ):
        before = contents(place)
        delta(*apply, "--out", place, "--overwrite", status=2)
        assert said in capsys.readouterr().err and contents(place) == before


# ---------------------------------------------------------------- files


def test_merging_is_the_same_in_either_order_and_warns_of_sums(edited, tiny_model_dir, tmp_path, capsys):
    one, two = edited("one", 1, DOWN), edited("two", 2, UP)
    delta("merge", one, two, "--out", tmp_path / "ab")
    delta("merge", two, one, "--out", tmp_path / "ba")
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "ba").read_bytes()
    assert capsys.readouterr().err == ""
    for way in (("one", "two"), ("two", "one")):  # one after the other gives the same model
        (first, second), folder = way, tmp_path / way[0]
        delta("apply", tmp_path / first, "--model", tiny_model_dir, "--out", f"{folder}-1")
        delta("apply", tmp_path / second, "--model", f"{folder}-1", "--out", f"{folder}-2")
    delta("apply", tmp_path / "ab", "--model", tiny_model_dir, "--out", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "one-2") == contents(tmp_path / "two-2")

    three = edited("three", 3, UP, DOWN)
    delta("merge", one, three, "--out", tmp_path / "sum")
    warning = capsys.readouterr().err
    assert warning.startswith("note: ") and DOWN in warning and UP not in warning
    a, b, sum_of = (load_file(tmp_path / name) for name in ("one", "three", "sum"))
    base = a[f"base::{DOWN}"]
    assert sum_of[DOWN].tobytes() == (base + ((a[DOWN] - base) + (b[DOWN] - base))).tobytes()
    assert sum_of[UP].tobytes() == b[UP].tobytes()


def test_a_composed_delta_does_what_both_do_one_after_the_other(edited, tiny_model_dir, tmp_path, capsys):
    first = edited("first", 1, DOWN)
    delta("apply", first, "--model", tiny_model_dir, "--out", tmp_path / "once")
    second = edited("second", 2, DOWN, UP, of=tmp_path / "once")
    delta("apply", second, "--model", tmp_path / "once", "--out", tmp_path / "twice")
    delta("compose", first, second, "--out", tmp_path / "both")
    delta("apply", tmp_path / "both", "--model", tiny_model_dir, "--out", tmp_path / "direct")
    assert contents(tmp_path / "direct") == contents(tmp_path / "twice")
    delta("revert", tmp_path / "both", "--model", tmp_path / "twice", "--out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tiny_model_dir)
    delta("diff", tiny_model_dir, tmp_path / "twice", "--out", tmp_path / "found")
    assert load_file(tmp_path / "found").keys() == load_file(tmp_path / "both").keys()
    for name, value in load_file(tmp_path / "found").items():
        assert value.tobytes() == load_file(tmp_path / "both")[name].tobytes()
    capsys.readouterr()
    delta("compose", second, first, "--out", tmp_path / "no", status=2)
    assert f"{DOWN} was another" in capsys.readouterr().err
    delta("merge", first, second, "--out", tmp_path / "no", status=2)
    assert (
        f"made on another base than the one(s) before it: {DOWN} had other values" in capsys.readouterr().err
    )
    delta("merge", first, "--out", tmp_path / "no", status=2)
    assert "two deltas or more" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_cards_are_stacked_and_taken_back_in_any_order(runs, tiny_model_dir, tmp_path):
    """Two deltas with cards, of tensors apart: each edit's card comes and goes with it."""
    _, run = runs["single"]
    loaded = load_delta(run / "delta.safetensors")
    for name, tensor, card in (("one", DOWN, "first card"), ("two", UP, "second card | `x` -->")):
        checkpoint = hf_folder.open_folder(str(tiny_model_dir))
        new = {tensor: np.full(checkpoint.tensors[tensor].shape, 0.5, np.float32)}
        save_delta(make_delta(checkpoint, new, {"cards": [card]}), tmp_path / name)
    assert len(loaded.cards()) == 1
    delta("apply", tmp_path / "one", "--model", tiny_model_dir, "--out", tmp_path / "1")
    delta("apply", tmp_path / "two", "--model", tmp_path / "1", "--out", tmp_path / "12")
    delta("merge", tmp_path / "two", tmp_path / "one", "--out", tmp_path / "both")
    delta("apply", tmp_path / "both", "--model", tiny_model_dir, "--out", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "12")
    readme = (tmp_path / "12" / "README.md").read_text()
    assert readme.count("first card") == readme.count("second card") == 1
    delta("compose", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "composed")
    for undo in (["two", "one"], ["one", "two"], ["both"], ["composed"]):
        model = tmp_path / "12"
        for name in undo:
            delta("revert", tmp_path / name, "--model", model, "--out", tmp_path / "-".join([*undo, name]))
            model = tmp_path / "-".join([*undo, name])
        assert contents(model) == contents(tiny_model_dir), undo


def test_a_readme_that_was_written_meanwhile_stays(runs, tmp_path):
    base, run = runs["sharded"]
    model = shutil.copytree(run / "hf", tmp_path / "model")
    text = (base / "README.md").read_bytes()
    for own, left in ((b"mine", b"mine"), (text, text), (None, None)):
        readme = model / "README.md"
        readme.unlink(missing_ok=True)
        if own is not None:
            readme.write_bytes(own)
        out = tmp_path / "out"
        delta("revert", run / "delta.safetensors", "--model", model, "--out", out, "--overwrite")
        got = out / "README.md"
        assert (got.read_bytes() if got.exists() else None) == left


def test_a_delta_is_as_large_as_what_it_edits(edited, tiny_model_dir):
    sizes = [edited("x", 0, *names).stat().st_size for names in ((DOWN,), (DOWN, UP))]
    assert 2 * 32 * 64 * 4 <= sizes[1] - sizes[0] < 2 * 32 * 64 * 4 + 1000
    assert sizes[0] < (tiny_model_dir / "model.safetensors").stat().st_size / 3


def test_a_file_is_replaced_only_if_told(edited, tmp_path, capsys):
    one, two = edited("one", 1, DOWN), edited("two", 2, UP)
    before = one.read_bytes()
    delta("merge", one, two, "--out", one, status=2)
    assert "already exists" in capsys.readouterr().err and one.read_bytes() == before
    delta("merge", one, two, "--out", one, "--overwrite")
    assert set(load_delta(one).new) == {DOWN, UP}
    delta("merge", one, two, "--out", tmp_path / "gone" / "x", status=2)
    assert "no folder" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_nothing(edited, runs, tmp_path, capsys):
    one, two = edited("one", 1, DOWN), edited("two", 2, UP)
    base, run = runs["single"]
    before, names = contents(base), sorted(p.name for p in tmp_path.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # for files written from here on
    try:
        delta("merge", one, two, "--out", tmp_path / "ab", status=1)
        delta("merge", one, two, "--out", two, "--overwrite", status=1)
        delta("apply", run / "delta.safetensors", "--model", base, "--out", tmp_path / "out", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert capsys.readouterr().err.count("failed: ") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert set(load_delta(two).new) == {UP} and contents(base) == before


# ---------------------------------------------------------------- show, and what every action refuses


def test_show_says_what_is_edited_and_by_how_much(runs, edited, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, run = runs["single"]
    file = run / "delta.safetensors"
    one = edited("one", 7, DOWN)
    delta("merge", file, one, "--out", tmp_path / "merged")
    capsys.readouterr()
    delta("show", file, tmp_path / "merged")
    shown = capsys.readouterr().out
    loaded = load_delta(file)
    for name, new in loaded.new.items():
        change, base = (float(np.linalg.norm(a)) for a in (new - loaded.base[name], loaded.base[name]))
        line = next(text for text in shown.split("\n") if name in text)
        assert "x".join(map(str, new.shape)) in line and "F32" in line and " 32 " in line
        assert f" {change:.3g} " in line and f"{100 * change / base:.2f} %" in line
    assert "all 3" in shown and "all 4" in shown and "versions" in shown
    assert f"fingerprint {loaded.metadata['fingerprint']}\n" in shown and "edits       12\n" in shown
    assert f"made of     edits 12, data_sha256 {loaded.metadata['data_sha256']}" in shown
    assert "made by     merge\n" in shown and "edits       19\n" in shown


def test_show_fits_a_screen(tiny_model_dir, edited, capsys):
    every = sorted(hf_folder.open_folder(str(tiny_model_dir)).tensors)
    delta("show", edited("x", 1, *every))
    shown = capsys.readouterr().out
    assert f"{len(every) - 20} more; all {len(every)}" in " ".join(shown.replace("│", " ").split())
    assert shown.count("F32") == 20


def test_damaged_files_and_missing_models_end_with_one_message(runs, edited, tmp_path, capsys):
    base, run = runs["single"]
    good, bad = edited("good", 1, DOWN), tmp_path / "bad"
    whole = good.read_bytes()
    tensors = load_file(good)
    no_twin = {DOWN: tensors[DOWN]}

    def save(path):
        save_file(no_twin, path, load_delta(good).metadata)

    damages = [(lambda path, n=n: path.write_bytes(whole[:n])) for n in (0, 5, 100, len(whole) - 1)]
    damages += [save, lambda path: path.write_bytes(whole[:-9] + b"?" + whole[-8:]), Path.unlink, Path.mkdir]
    for damage in damages:
        damage(bad)
        for arguments in (
            ["show", bad],
            ["apply", bad, "--model", base, "--out", tmp_path / "out"],
            ["revert", bad, "--model", base, "--out", tmp_path / "out"],
            ["merge", good, bad, "--out", tmp_path / "out"],
            ["compose", bad, good, "--out", tmp_path / "out"],
        ):
            delta(*arguments, status=2)
            error = capsys.readouterr().err
            assert error.startswith(f"error: {bad}: ") and error.count("\n") == 1
    for model in (tmp_path / "nowhere", tmp_path):
        delta("apply", good, "--model", model, "--out", tmp_path / "out", status=2)
        delta("diff", base, model, "--out", tmp_path / "out", status=2)
        assert capsys.readouterr().err.count("error: ") == 2
    delta("diff", base, base, "--out", tmp_path / "out", status=2)
    assert "no delta" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_is_a_command(edited, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "locft_jax.delta", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("show", edited("x", 1, DOWN))
    assert (done.returncode, done.stderr) == (0, "") and "32x64" in done.stdout
    failed = run("show", tmp_path / "gone")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert "apply" in run("--help").stdout and run("apply").returncode == 2

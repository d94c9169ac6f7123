"""Where results may go, a folder or a URL: checked before any work, then written whole (atomic.py)."""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from locft_jax.errors import UserError
from locft_jax.io.atomic import PART, beside, read_json, recover, whole_file, whole_folder, whole_prefix
from locft_jax.io.hf_folder import HFFolder
from locft_jax.io.remote import Remote, failures, is_url, open_path, open_remote
from locft_jax.model.memory import as_text

KEPT = 2  # checkpoints at a time


def local_place(out: str | Path) -> Path:
    """Where a command writes that knows folders only. Raises UserError for a URL."""
    if is_url(str(out)):
        raise UserError(f"--out: {out} is a URL, this command writes to a folder; copy it when it is done")
    return Path(out)


def place_of(target: str | Path) -> tuple[Path, Remote | None]:
    """The folder of a run, and where its results go if that is a URL: then the folder, in `runs/`, holds only
    what is written here meanwhile, its checkpoints and the results until they are uploaded."""
    if not is_url(target):
        return Path(target), None
    store = open_remote(str(target))
    return Path("runs") / re.sub(r"[^\w.-]+", "-", store.url), store


@contextmanager
def results(out: Path, store: Remote | None) -> Iterator[Path]:
    """The folder to write a run's results to (`whole_folder`, or `whole_prefix`)."""
    if store is None:
        with whole_folder(out) as folder:
            yield folder
        return
    with whole_prefix(store, beside(out.resolve())[0]) as folder:
        yield folder
    shutil.rmtree(out, ignore_errors=True)  # the checkpoints


@contextmanager
def result_file(out: str | Path) -> Iterator[Path]:
    """A file to write that becomes `out`, also at a URL, when the block ends well."""
    if not is_url(out):
        with whole_file(Path(out)) as part:
            yield part
        return
    with tempfile.TemporaryDirectory(prefix="locft-jax-") as folder:
        yield Path(folder) / "file"
        open_remote(str(out)).upload(Path(folder) / "file")


def check_out(out: Path, overwrite: bool, resume: bool = False, proof: str = "report.json") -> None:
    """Refuse a folder that holds something or cannot be made. `overwrite` allows one that holds results (the
    file `proof`), `resume` a run's results or checkpoint: nothing else is ever deleted. What a killed export
    left half done is finished or undone first."""
    _look(out)
    recover(out)
    out = out.resolve()
    there = _existing(out)
    if not there.is_dir():
        raise UserError(f"--out: {there} is a file; choose another folder")
    names = {p.name for p in out.iterdir()} if there == out else set()
    interrupted = saved_something(out / "checkpoint")
    if names - {"checkpoint"} or interrupted:
        if not (overwrite or resume):
            what = "already exists; choose another folder, or add --overwrite"
            if interrupted:
                what = "holds a run that was interrupted; add --resume, or --overwrite to begin anew"
            raise UserError(f"--out: {out} {what}")
        if names - {"checkpoint"} and proof not in names:
            flag = "--resume" if resume else "--overwrite"
            raise UserError(f"{flag}: {out} holds no results (no {proof}); choose another folder")
    _check_writable(out.parent if there == out else there)  # results are made beside `out`, then renamed


def check_prefix(store: Remote, overwrite: bool, resume: bool = False, proof: str = "report.json") -> None:
    """Refuse a prefix that holds something or cannot be written (an empty file is, and is removed again).
    `overwrite` and `resume` allow one that holds results (the file `proof`) or half of them."""
    if "/" not in store.url.partition("://")[2]:
        raise UserError(f"--out: {store} is a whole bucket; name a prefix in it, such as {store}/runs/mine")
    names = set(store.names(deep=True))
    if names and not (overwrite or resume):
        half = "the half-written results of an interrupted run" if PART in names else "files"
        raise UserError(f"--out: {store} holds {half} already; choose another prefix, or add --overwrite")
    if names and not names & {proof, PART}:
        flag = "--overwrite" if overwrite else "--resume"
        raise UserError(f"{flag}: {store} holds no results (no {proof}); choose another prefix")
    with failures(store.url, "written"):
        (store / PART).write(b"")
    if PART not in names:
        (store / PART).remove()


def check_model_out(out: str | Path, overwrite: bool, source: Path | Remote) -> None:
    """`check_out` for a model folder or URL that is made of the one at `source`, which must outlive it; a
    folder with others in it is no model folder that was written here."""
    target = open_path(out)
    if isinstance(target, Remote):
        own = f"{source}/".startswith(f"{target}/")
    else:
        own = isinstance(source, Path) and source.resolve().is_relative_to(target.resolve())
    if own:
        raise UserError(f"--out: {out} would replace the model it is made of; choose another place")
    if isinstance(target, Remote):
        check_prefix(target, overwrite, proof="config.json")
        inner = [name for name in target.names(deep=True) if "/" in name]
    else:
        check_out(target, overwrite, proof="config.json")
        inner = sorted(p.name for p in target.glob("*/"))
    if inner:
        raise UserError(f"--overwrite: {out} holds folders ({inner[0]}), not only a model; choose another")


def check_file(out: str | Path, overwrite: bool) -> None:
    """Refuse a result file, here or at a URL, that exists already or cannot be written."""
    file = open_path(out)
    if isinstance(file, Path):
        _look(file)
        if file.is_dir():
            raise UserError(f"--out: {out} is a folder; name a file in it, such as {out}/figures.json")
        if not file.resolve().parent.is_dir():
            raise UserError(f"--out: there is no folder {file.resolve().parent}; make it first")
        _check_writable(file.resolve().parent)
    if file.exists() and not overwrite:
        raise UserError(f"--out: {out} already exists; choose another file, or add --overwrite")


def check_space(
    out: Path, folder: HFFolder, site: Sequence[str], export: Collection[str], store: Remote | None = None
) -> None:
    """Refuse a disk on which the results (of the kinds `export`) and the checkpoints will not fit. Sizes are
    upper bounds: orbax compresses. What goes to a URL is written here first, but for hf."""
    sizes = {"hf": sum(folder.files().values()), "delta": 2 * folder.nbytes(site), "orbax": folder.nbytes()}
    needed = {kind: sizes[kind] for kind in export if not (store and kind == "hf")}
    # The master and two moments in float32, of the checkpoints kept and the one being written.
    state = 12 * sum(math.prod(folder.tensors[n].shape) for n in site) * (KEPT + 1)
    needed["checkpoints while it runs"] = state
    there = _existing(out.resolve())
    free, total = shutil.disk_usage(there).free, sum(needed.values())
    if total > free:
        parts = ", ".join(f"{kind} {as_text(size)}" for kind, size in needed.items())
        other = "run it in another working directory" if store else "use an --out on another disk"
        raise UserError(
            f"--out: {there} has {as_text(free)} left, the results need about {as_text(total)} "
            f"({parts}); name fewer kinds in export, make room, or {other}"
        )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _look(out: Path) -> None:
    """Refuse a path that cannot even be looked at, such as a name that is too long."""
    try:
        out.resolve().exists()
    except (OSError, RuntimeError, ValueError) as e:  # RuntimeError: links in a circle
        why = getattr(e, "strerror", None) or e
        raise UserError(f"--out: {str(out)[:80]} cannot be used ({why}); choose another") from None


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out: {folder} cannot be written; choose another folder")


def saved_something(folder: Path) -> bool:
    """Whether a run can be resumed from this folder (a checkpoint/)."""
    some = saved_steps(folder) or any((folder / name).exists() for name in ("before.json", "runs.jsonl"))
    return bool(some) and read_json(folder / "run.json") is not None


def saved_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are whole: orbax renames them when they are."""
    steps = folder / "steps"
    return [int(p.name) for p in steps.iterdir() if p.name.isdecimal()] if steps.is_dir() else []

"""What a run leaves behind, apart from model/hf.py and model/delta.py: the orbax checkpoint, and where
results may go."""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from locft_jax.errors import UserError
from locft_jax.io.atomic import beside, read_json, recover, whole_file, whole_folder
from locft_jax.io.hf_folder import HFFolder
from locft_jax.io.hf_save import save_hf, save_hf_at
from locft_jax.io.remote import Remote, check_prefix, is_url, open_remote, prefix, whole_prefix
from locft_jax.model.memory import as_text

KEPT = 2  # checkpoints at a time


def local_place(out: str | Path) -> Path:
    """Where a command writes that knows folders only. Raises UserError for a URL."""
    if is_url(str(out)):
        raise UserError(f"--out: {out} is a URL, this command writes to a folder; copy it when it is done")
    return Path(out)


def place_of(target: str | Path) -> tuple[Path, Remote | None]:
    """The folder of a run, and where its results go if that is a URL: then the folder, in `runs/`, holds
    only what lies here meanwhile, its checkpoints and the results until they are uploaded."""
    if not is_url(target):
        return Path(target), None
    store = open_remote(str(target))
    return Path("runs") / re.sub(r"[^\w.-]+", "-", store.url), store


@contextmanager
def results(out: Path, store: Remote | None) -> Iterator[Path]:
    """The folder to write a run's results to (`files.whole_folder`, or `remote.whole_prefix`)."""
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


def save_model(
    checkpoint: HFFolder,
    edited: Mapping[str, np.ndarray],
    out: str | Path,
    other: Mapping[str, bytes | None],
) -> None:
    """`save_hf` to a folder or a URL, in place of what is there."""
    if not is_url(out):
        return save_hf(checkpoint, edited, Path(out), other)
    store = open_remote(str(out))
    with prefix(store, "config.json"):
        save_hf_at(checkpoint, edited, store, other)


def check_out(out: Path, overwrite: bool, resume: bool = False, proof: str = "report.json") -> None:
    """Refuse, before any work, a folder that holds something or cannot be made. `overwrite` allows
    one that holds results (the file `proof`), `resume` a run's results or checkpoint: nothing else
    is ever deleted. What a killed export left undone is finished or taken back first."""
    _look(out)
    recover(out)
    out = out.resolve()
    place = out
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--out: {place} is a file; choose another folder")
    names = {p.name for p in out.iterdir()} if place == out else set()
    interrupted = saved_something(out / "checkpoint")
    if names - {"checkpoint"} or interrupted:
        if interrupted and not (overwrite or resume):
            raise UserError(
                f"--out: {out} holds a run that was interrupted; add --resume to go on with it, "
                "--overwrite to begin anew, or choose another folder"
            )
        if not (overwrite or resume):
            raise UserError(f"--out: {out} already exists; choose another folder, or add --overwrite")
        if names - {"checkpoint"} and proof not in names:
            flag = "--resume" if resume else "--overwrite"
            raise UserError(f"{flag}: {out} holds no results (no {proof}); choose another folder")
    above = out.parent if place == out else place  # results are made beside `out`, then renamed
    if not os.access(above, os.W_OK):
        raise UserError(f"--out: {above} cannot be written; choose another folder")


def check_model_out(out: str | Path, overwrite: bool, source: Path | Remote) -> None:
    """`check_out` for a model folder or URL that is made of the one at `source`, which must outlive it; a
    folder with others in it is no model folder that was written here."""
    if is_url(out):
        store = open_remote(str(out))
        if f"{source}/".startswith(f"{store}/"):
            raise UserError(f"--out: {out} would replace the model it is made of; choose another prefix")
        check_prefix(store, overwrite, proof="config.json")
        folders = [name for name in store.all_names() if "/" in name]
        if folders:
            raise UserError(
                f"--overwrite: {out} holds folders ({folders[0]}), not only a model; choose another"
            )
        return
    out = Path(out)
    if isinstance(source, Remote):
        return check_out(out, overwrite, proof="config.json")
    place, source = out.resolve(), source.resolve()
    if place == source or place in source.parents:
        raise UserError(f"--out: {out} would replace the model it is made of; choose another folder")
    check_out(out, overwrite, proof="config.json")
    inner = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.exists() else []
    if inner:
        raise UserError(f"--overwrite: {out} holds folders ({inner[0]}), not only a model; choose another")


def check_space(
    out: Path,
    checkpoint: HFFolder,
    site: Sequence[str],
    wanted: Sequence[str],
    store: Remote | None = None,
) -> None:
    """Refuse, before any work, a disk on which the results (of the kinds `wanted`) will not fit. Their
    sizes are upper bounds: orbax compresses. What goes to a URL lies here first, but for hf."""
    wanted = [kind for kind in wanted if not (store and kind == "hf")]
    sizes = {
        "hf": sum(checkpoint.files().values()),
        "delta": 2 * checkpoint.nbytes(site),
        "orbax": checkpoint.nbytes(),
    }
    # The master and two moments in float32, of the checkpoints kept and the one being written.
    state = 12 * sum(math.prod(checkpoint.tensors[n].shape) for n in site) * (KEPT + 1)
    place = out.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = lambda kinds: state + sum(sizes[k] for k in kinds)  # noqa: E731
    if needed(wanted) <= free:
        return
    parts = ", ".join(f"{k} {as_text(sizes[k])}" for k in wanted)
    fewer = [k for k in (["hf", "delta"], ["delta"]) if set(k) < set(wanted) and needed(k) <= free]
    remedy = f"use export=[{', '.join(fewer[0])}], or" if fewer else "make room, or use"
    another = "another working directory: they lie there until they are uploaded" if store else ""
    raise UserError(
        f"--out: {place} has {as_text(free)} left, the results need about {as_text(needed(wanted))} "
        f"({parts}, checkpoints while it runs {as_text(state)}); {remedy} "
        + (another or "an --out on another disk")
    )


def check_file(out: str | Path, overwrite: bool) -> None:
    """Refuse, before any work, a result file, here or at a URL, that exists already or cannot be written."""
    if is_url(out):
        if open_remote(str(out)).exists() and not overwrite:
            raise UserError(f"--out: {out} already exists; choose another file, or add --overwrite")
        return
    out = Path(out)
    _look(out)
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file in it, such as {out / 'figures.json'}")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} already exists; choose another file, or add --overwrite")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out: there is no folder {out.resolve().parent}; make it first")
    if not os.access(out.resolve().parent, os.W_OK):
        raise UserError(f"--out: {out.resolve().parent} cannot be written; choose another folder")


def _look(out: Path) -> None:
    """Refuse a path that cannot even be looked at, such as a name that is too long."""
    try:
        out.resolve().exists()
    except (OSError, RuntimeError, ValueError) as e:  # RuntimeError: links in a circle
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--out: {str(out)[:80]} cannot be used ({reason}); choose another") from None


def saved_something(folder: Path) -> bool:
    """Whether a run can go on from this folder (a checkpoint/)."""
    return read_json(folder / "run.json") is not None and (
        bool(saved_steps(folder)) or any((folder / name).exists() for name in ("before.json", "runs.jsonl"))
    )


def saved_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are whole: orbax renames them when they are."""
    steps = folder / "steps"
    return [int(p.name) for p in steps.iterdir() if p.name.isdecimal()] if steps.is_dir() else []

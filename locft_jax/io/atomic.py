"""Atomic writes: files and folders that appear whole or not at all.

Here they are written beside, fsynced and renamed. An object store has no folders and renames nothing, so
there a prefix is complete when its last file (a run's `report.json`, a model's `config.json`) is there: it is
removed first and written last, and until then the file `.locft-part` marks a half-written prefix.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from locft_jax.io.remote import Remote, in_parallel

PART = ".locft-part"


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(out: Path, value: Any) -> None:
    """A file of readable JSON, keys in the given order, that appears whole or not at all."""
    with whole_file(out) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def append_jsonl(path: Path, line: Mapping[str, Any]) -> None:
    """One more line; on the disk when this returns."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def kept_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines that `append_jsonl` left; without the one that was being written when the process died."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text))
        with whole_file(path) as part:
            write_jsonl(part, lines)
    return lines


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A file to write that becomes `out` by renaming when the block ends well; on any error what was at `out`
    stays as it was."""
    out = out.resolve()
    part, _ = beside(out)
    try:
        yield part
        sync(part)
        os.replace(part, out)
        sync(out.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """As `whole_file`, a folder to fill. A process that dies meanwhile leaves names to `recover`."""
    out = out.resolve()
    part, old = beside(out)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            sync(path)
    except BaseException:
        for _ in range(20):  # after an error another library's threads may still write into it
            shutil.rmtree(part, ignore_errors=True)
            if not part.exists():
                break
            time.sleep(0.1)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Finish or undo what a `whole_folder` that was killed left half done."""
    out = out.resolve()
    part, old = beside(out)
    if old.exists() and not out.exists():
        os.replace(part if part.exists() else old, out)  # the new folder was complete
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(part, ignore_errors=True)


def beside(out: Path) -> tuple[Path, Path]:
    """Names, ours alone, of what is being made and of the folder that it replaces."""
    return out.with_name(f".{out.name}.locft-part"), out.with_name(f".{out.name}.locft-old")


@contextmanager
def prefix(store: Remote, proof: str) -> Iterator[None]:
    """Around what writes to `store`, in place of what is there, and the file `proof` last. On any error
    nothing is left there: what was there before is gone too, for an object store cannot rename."""
    try:
        (store / PART).write(b"")
        (store / proof).remove()
        in_parallel(lambda name: (store / name).remove(), set(store.names(deep=True)) - {PART})
        yield
        (store / PART).remove()
    except BaseException:
        store.remove()
        raise


@contextmanager
def whole_prefix(store: Remote, part: Path, proof: str = "report.json") -> Iterator[Path]:
    """As `prefix`, a local folder (`part`) to fill, which is uploaded when the block ends well; the block
    may also write to `store` itself."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with prefix(store, proof):
            yield part
            files = {str(p.relative_to(part)) for p in part.rglob("*") if p.is_file()}
            in_parallel(lambda name: (store / name).upload(part / name), sorted(files - {proof}))
            (store / proof).upload(part / proof)
    finally:
        shutil.rmtree(part, ignore_errors=True)

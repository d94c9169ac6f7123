"""Files and folders that appear whole or not at all: written beside, fsynced, renamed."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, keys in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def append_jsonl(path: Path, line: Mapping[str, Any]) -> None:
    """One more line; on the disk when this returns."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def kept_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines that `append_jsonl` left, [] where there is no file; without the one that was being written
    when the process was killed."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text))
        with whole_file(path) as part:
            write_jsonl(part, lines)
    return lines


def write_whole_json(out: Path, value: Any) -> None:
    """A JSON file that appears whole or not at all."""
    with whole_file(out) as part:
        write_json(part, value)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A file to write that becomes `out` by renaming when the block ends well; on any error what was at
    `out` before stays as it was."""
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
    """A folder to fill that becomes `out` by renaming when the block ends well; on any error what was
    at `out` before stays as it was. A process that dies meanwhile leaves names to `recover`."""
    out = out.resolve()
    part, old = beside(out)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            sync(path)
    except BaseException:
        _remove(part)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Finish or take back what a `whole_folder` that was killed left undone."""
    out = out.resolve()
    part, old = beside(out)
    if old.exists() and not out.exists():
        os.replace(part if part.exists() else old, out)  # the new folder was complete
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(part, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder, also one that another library's threads, after an error, still write into."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def beside(out: Path) -> tuple[Path, Path]:
    """Names of what is being made and of the folder it replaces: ours alone, nobody else's."""
    return out.with_name(f".{out.name}.locft-part"), out.with_name(f".{out.name}.locft-old")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

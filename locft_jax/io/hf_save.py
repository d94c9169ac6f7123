"""Saving: the edited model as a Hugging Face folder whose unedited bytes are those of the base."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from locft_jax.io import reading, remote
from locft_jax.io.atomic import prefix, whole_folder
from locft_jax.io.hf_folder import DTYPES, HFFolder, is_weights
from locft_jax.model.sharding import fetch
from locft_jax.model.weights import Overrides

Tensors = Mapping[str, np.ndarray]  # HF name -> array, in HF layout and as the folder stores it


def to_checkpoint_dtype(folder: HFFolder, edits: Overrides) -> dict[str, np.ndarray]:
    """Edited tensors rounded to what the folder stores: exactly what will be exported."""
    return {n: fetch(a).astype(DTYPES[folder.tensors[n].dtype]) for n, a in edits.items()}


def save_hf(
    folder: HFFolder,
    edited: Tensors,
    out: Path | remote.Remote,
    other: Mapping[str, bytes | None] = {},
) -> None:
    """Write the edited model to `out`: whole or not at all, in place of what is there. `other`: small files
    that are not to be the base's: {name: bytes, or None to leave it out}.

    Files that hold edited tensors are copied and these overwritten, so that every other byte stays as it is.
    Weight files without an edited tensor are hard links to the base's where the file system can, so that they
    take no time and no space: a program that changes such a file in place, rather than replacing it, changes
    both models (`cp -r` parts them). The small files that people edit by hand (config, tokenizer) are always
    copies. Nothing that goes to a URL passes through a disk here, and `config.json` is written last.
    """
    for name, value in edited.items():
        info = folder.tensors[name]
        if (value.shape, value.dtype) != (info.shape, DTYPES[info.dtype]):
            raise ValueError(f"{name} is {value.dtype}{list(value.shape)}, the folder's is {info}")
    left_out = {name for name, content in other.items() if content is None}
    names = sorted((folder.files().keys() | other.keys()) - left_out - {"config.json"})
    if isinstance(out, remote.Remote):
        with prefix(out, "config.json"):
            remote.in_parallel(lambda name: _write(folder, edited, name, other.get(name), out), names, 4)
            _write(folder, edited, "config.json", other.get("config.json"), out)
    else:
        with whole_folder(out) as part:
            for name in [*names, "config.json"]:
                _write(folder, edited, name, other.get(name), part)


def _write(
    folder: HFFolder, edited: Tensors, name: str, content: bytes | None, out: Path | remote.Remote
) -> None:
    """One file of the edited model; what is the base's is linked or copied inside the store if possible."""
    if content is None and not any(folder.tensors[n].file == name for n in edited):
        if isinstance(out, remote.Remote) and folder.store:
            return (out / name).copy_from(folder.store / name)
        if isinstance(out, Path) and not folder.store and is_weights(name) and _link(folder.path / name, out):
            return
    pieces = _pieces(folder, name, edited) if content is None else iter([content])
    if isinstance(out, remote.Remote):
        (out / name).write(pieces)
    else:
        with open(out / name, "wb") as f:
            f.writelines(pieces)


def _pieces(folder: HFFolder, file: str, edited: Tensors) -> Iterator[bytes]:
    """The bytes of a file of the model with the edited tensors in it, block by block."""
    spans = sorted((i.begin, n) for n, i in folder.tensors.items() if i.file == file and n in edited)
    at, size = 0, folder.files()[file]

    def unedited(end: int) -> Iterator[bytes]:
        for begin in range(at, end, remote.BLOCK):
            raw = np.empty(min(remote.BLOCK, end - begin), np.uint8)
            reading.fill(folder.source / file, begin, raw)
            yield raw.tobytes()

    for begin, name in spans:
        yield from unedited(begin)
        yield np.ascontiguousarray(edited[name]).tobytes()
        at = begin + edited[name].nbytes
    yield from unedited(size)


def _link(path: Path, folder: Path) -> bool:
    """Give a file (what it points to, if it is a symbolic link) a second name in `folder`, if possible."""
    try:
        os.link(path.resolve(), folder / path.name)
    except OSError:  # another file system, one without links, another owner's file
        return False
    return True

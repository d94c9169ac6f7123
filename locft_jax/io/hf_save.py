"""io.hf_save."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from locft_jax.io import reading, remote
from locft_jax.io.atomic import whole_folder
from locft_jax.io.hf_folder import DTYPES, HFFolder, is_weights
from locft_jax.model.sharding import fetch
from locft_jax.model.weights import Overrides


def to_checkpoint_dtype(checkpoint: HFFolder, edits: Overrides) -> dict[str, np.ndarray]:
    """Edited tensors rounded to what the checkpoint stores: exactly what will be exported."""
    return {n: fetch(a).astype(DTYPES[checkpoint.tensors[n].dtype]) for n, a in edits.items()}


def save_hf(
    checkpoint: HFFolder,
    edited: Mapping[str, np.ndarray],
    out: Path,
    other: Mapping[str, bytes | None] = {},  # noqa: B006 (never written to)
) -> None:
    """Write the edited model to `out`: whole or not at all, in place of what is there. `other`: small files
    that are not to be the base's: {name: bytes, or None to leave it out}.

    Files that hold edited tensors (given in the checkpoint's shapes and dtypes) are copied and these
    overwritten, so that every other byte stays as it is. Weight files without an edited tensor are hard
    links to the checkpoint's where the file system can, so that they take no time and no space: a program
    that changes such a file in place, rather than replacing it, changes both models (`cp -r` parts them).
    The small files that people edit by hand (config, tokenizer) are always copies.
    """
    for name, value in edited.items():
        info = checkpoint.tensors[name]
        if (value.shape, value.dtype) != (info.shape, DTYPES[info.dtype]):
            raise ValueError(f"{name} is {value.dtype}{list(value.shape)}, the checkpoint's is {info}")
    rewritten = {checkpoint.tensors[name].file for name in edited}
    with whole_folder(out) as part:
        for name in checkpoint.files().keys() - other.keys():
            if checkpoint.store:
                with open(part / name, "wb") as f:
                    f.writelines(_pieces(checkpoint, name, edited))
            elif name in rewritten or not (is_weights(name) and _link(checkpoint.path / name, part)):
                shutil.copyfile(checkpoint.path / name, part / name)
        for name, content in other.items():
            if content is not None:
                (part / name).write_bytes(content)
        for name, value in edited.items() if not checkpoint.store else ():
            info = checkpoint.tensors[name]
            with open(part / info.file, "r+b") as f:
                f.seek(info.begin)
                f.write(np.ascontiguousarray(value).tobytes())


def save_hf_at(
    checkpoint: HFFolder,
    edited: Mapping[str, np.ndarray],
    out: remote.Remote,
    other: Mapping[str, bytes | None] = {},  # noqa: B006 (never written to)
) -> None:
    """`save_hf` to a URL. Nothing passes through a disk here: files without an edited tensor are copied
    inside the store where the base is in it, the others are streamed. `config.json` is written last."""

    def put(name: str) -> None:
        edits = any(checkpoint.tensors[n].file == name for n in edited)
        if name in other:
            (out / name).write(other[name] or b"")
        elif checkpoint.store and not edits:
            (out / name).copy_from(checkpoint.store / name)
        else:
            (out / name).write(_pieces(checkpoint, name, edited))

    left_out = {name for name, content in other.items() if content is None}
    names = (checkpoint.files().keys() | other.keys()) - left_out - {"config.json"}
    remote.in_parallel(put, sorted(names), 4)
    put("config.json")


def _pieces(checkpoint: HFFolder, file: str, edited: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The bytes of a file of the model with the edited tensors in it, block by block."""
    spans = sorted((i.begin, n) for n, i in checkpoint.tensors.items() if i.file == file and n in edited)
    at, size = 0, checkpoint.files()[file]

    def unedited(end: int) -> Iterator[bytes]:
        for begin in range(at, end, remote.BLOCK):
            raw = np.empty(min(remote.BLOCK, end - begin), np.uint8)
            reading.fill(checkpoint.place / file, begin, raw)
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

"""Hugging Face folders in and out: streaming load into sharded stacks, byte-exact save.

Loading reads the byte ranges that each device needs straight from the safetensors files; nothing
passes through torch. Saving rewrites only the files that hold edited tensors.
"""

import dataclasses
import fnmatch
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from locft_jax.errors import UserError
from locft_jax.io import reading, remote
from locft_jax.io.safetensors_header import SIZES, TensorInfo, read_header, read_remote_header
from locft_jax.model.spec import ModelSpec, eos_ids, parse_spec, read_config
from locft_jax.model.weights import weight_table

if TYPE_CHECKING:
    pass

DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# Files beside the weights that make up a model folder; a Hub download takes these and no others.
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """A model folder that has been looked at but not loaded."""

    path: Path  # of a model at a URL: a local copy of all but its weight files
    name: str
    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorInfo]  # every tensor of every file, by HF name
    eos: tuple[int, ...]
    store: remote.Remote | None = None  # where the files of a model at a URL are

    @property
    def place(self) -> Path | remote.Remote:
        """Where its weight files are, and what messages call it."""
        return self.store or self.path

    def files(self) -> dict[str, int]:
        """Bytes of every file of the model, by name: those that an export takes over."""
        if self.store:
            found = self.store.names()
        else:
            found = {p.name: p.stat().st_size for p in self.path.iterdir() if p.is_file()}
        return {name: size for name, size in sorted(found.items()) if not name.startswith(".")}

    @property
    def dtype(self) -> Any:
        """numpy dtype of the matrices: that of the embedding."""
        return DTYPES[self.tensors["model.embed_tokens.weight"].dtype]

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of these tensors (default: of all) as the checkpoint stores them."""
        infos = self.tensors.values() if names is None else (self.tensors[n] for n in names)
        return sum(math.prod(info.shape) * SIZES[info.dtype] for info in infos)


def find_model(path_or_id: str) -> Path:
    """A local folder, or a Hub id that is downloaded (safetensors, JSON and tokenizer files only).

    Raises UserError when there is neither.
    """
    folder = Path(os.path.expanduser(path_or_id))
    if os.path.isdir(folder):  # unlike Path's own, never an error
        return folder
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise UserError(
            f"model_name_or_path: no folder {path_or_id!r} (and it is not a Hub id like owner/name)"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path_or_id, allow_patterns=HUB_PATTERNS))
    except Exception as e:  # the hub client raises dozens of kinds; each means the same to the user
        reason = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise UserError(
            f"model_name_or_path: {path_or_id!r} is no folder here and could not be fetched "
            f"from the Hub either: {reason}"
        ) from None


def open_folder(path_or_id: str) -> HFFolder:
    """Read config and safetensors headers of a model folder, Hub id or URL; check every tensor's name, shape
    and dtype.

    Raises UserError listing all that is missing or misshapen; no weights are read.
    """
    if not remote.is_url(path_or_id):
        return _open(find_model(path_or_id), Path(path_or_id).name)
    store = remote.open_remote(path_or_id)
    names = store.names()
    if not names:
        raise UserError(f"model_name_or_path: no files at {store}; check the bucket's name and the path")
    small = [n for n in names if any(fnmatch.fnmatch(n, p) for p in HUB_PATTERNS) and not is_weights(n)]
    folder = remote.fetch(store, small)
    with remote.called(folder, store):
        return _open(folder, Path(path_or_id).name, store, names)


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _open(
    folder: Path, name: str, store: remote.Remote | None = None, sizes: Mapping[str, int] | None = None
) -> HFFolder:
    config = read_config(folder)
    spec = parse_spec(config, str(folder / "config.json"))
    tensors = _headers(folder, store, sizes)
    missing = []
    wrong = [
        f"{tensor} has dtype {info.dtype}, which this program cannot copy"
        for tensor, info in tensors.items()
        if info.dtype not in SIZES
    ]
    for row in weight_table(spec).values():
        for tensor in row.names():
            info = tensors.get(tensor)
            if info is None:
                missing.append(tensor)
            elif info.shape != row.shape:
                wrong.append(f"{tensor} is {list(info.shape)}, config.json implies {list(row.shape)}")
            elif info.dtype in SIZES.keys() - DTYPES.keys():
                wrong.append(f"{tensor} has dtype {info.dtype}, supported: {', '.join(DTYPES)}")
    if missing or wrong:
        lines = [f"missing {m}" for m in missing] + wrong
        more = f"\n  ... and {len(lines) - 15} more" if len(lines) > 15 else ""
        raise UserError(
            f"{folder}: the weights do not match config.json:\n  " + "\n  ".join(lines[:15]) + more
        )
    generation = folder / "generation_config.json"
    eos = eos_ids(config, read_config(generation) if generation.exists() else {})
    return HFFolder(folder, name, config, spec, tensors, eos, store)


def weight_files(folder: Path, present: Collection[str] | None = None) -> list[str]:
    """Names of the safetensors files: those of the index, else `model.safetensors`, else all. `present`: the
    names of all files (default: of those in the folder).

    Raises UserError when there are none, or when the index is malformed or names another folder.
    """
    present = {p.name for p in folder.iterdir() if p.is_file()} if present is None else present
    index = folder / "model.safetensors.index.json"
    if index.name in present:
        names = read_config(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index}: no weight_map of tensor name to file name")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or not is_weights(name):
                raise UserError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
            if name not in present:
                raise UserError(f"{folder / name}: missing, but model.safetensors.index.json names it")
        return files
    if "model.safetensors" in present:
        return ["model.safetensors"]
    files = sorted(filter(is_weights, present))
    if not files:
        raise UserError(f"{folder}: no .safetensors file; convert the model to safetensors first")
    return files


def _headers(
    folder: Path, store: remote.Remote | None, sizes: Mapping[str, int] | None
) -> dict[str, TensorInfo]:
    files = weight_files(folder, sizes)
    if store is None or sizes is None:
        headers = [read_header(folder / file) for file in files]
    else:
        headers = remote.in_parallel(lambda f: read_remote_header(store / f, sizes[f]), files)
    tensors: dict[str, TensorInfo] = {}
    for file, header in zip(files, headers, strict=True):
        for name, info in header.items():
            if name in tensors:  # an edit of one would leave the other as it was
                raise UserError(
                    f"{folder}: {tensors[name].file} and {file} both hold {name}; "
                    "leave one of the files, or one whose index names each tensor's file"
                )
            tensors[name] = info
    return tensors


def read_tensor(checkpoint: HFFolder, name: str) -> np.ndarray:
    """One tensor as the checkpoint stores it, HF layout and dtype."""
    info = checkpoint.tensors[name]
    return read_part(checkpoint, name, (slice(None),) * len(info.shape))


def read_part(checkpoint: HFFolder, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, one slice a dimension, in HF layout and the checkpoint's dtype."""
    info = checkpoint.tensors[name]
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, info.shape, strict=True))
    out = reading.empty(shape, reading.NUMPY[info.dtype])
    for job in reading.jobs(checkpoint.place, info, index, out):
        job()
    return out


def read_raw(checkpoint: HFFolder, name: str) -> bytes:
    """One tensor's bytes."""
    return read_tensor(checkpoint, name).tobytes()

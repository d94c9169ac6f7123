"""Hugging Face model folders (local, from the Hub, at a URL), opened: checked completely, no weights read."""

import dataclasses
import fnmatch
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from locft_jax.errors import UserError, reason, refuse
from locft_jax.io import reading, remote
from locft_jax.io.safetensors_header import NUMPY, SIZES, TensorInfo, read_header, read_remote_header
from locft_jax.model.spec import ModelSpec, eos_ids, parse_spec, read_config
from locft_jax.model.weights import weight_table

DTYPES: dict[str, DTypeLike] = {name: NUMPY[name] for name in ("F32", "F16", "BF16")}  # of a model's weights
# The files that make up a model folder; a Hub download takes these and no others.
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]

Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> safetensors dtype, shape


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """A model folder that has been opened and checked but not loaded."""

    path: Path  # of a model at a URL: a local copy of all but its weight files
    name: str
    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorInfo]  # every tensor of every file, by HF name
    eos: tuple[int, ...]
    store: remote.Remote | None = None  # where the files of a model at a URL are

    @property
    def source(self) -> Path | remote.Remote:
        """Where its weight files are, and what messages call it."""
        return self.store or self.path

    @property
    def layout(self) -> Layout:
        """dtype and shape of every tensor, by name."""
        return {name: (info.dtype, info.shape) for name, info in self.tensors.items()}

    @property
    def dtype(self) -> np.dtype:
        """numpy dtype of the matrices: that of the embedding."""
        return np.dtype(DTYPES[self.tensors["model.embed_tokens.weight"].dtype])

    def files(self) -> dict[str, int]:
        """Bytes of every file of the model, by name: those that an export takes over."""
        found = self.store.names() if self.store else _sizes(self.path)
        return {name: size for name, size in sorted(found.items()) if not name.startswith(".")}

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of these tensors (default: of all) as they are stored."""
        infos = self.tensors.values() if names is None else (self.tensors[n] for n in names)
        return sum(math.prod(info.shape) * SIZES[info.dtype] for info in infos)


def find_model(path_or_id: str) -> Path:
    """A local folder, or a Hub id that is downloaded (HUB_PATTERNS only). Raises UserError for neither."""
    folder = Path(os.path.expanduser(path_or_id))
    if os.path.isdir(folder):  # unlike Path's own, never an error
        return folder
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"model_name_or_path: no folder {path_or_id!r} (and no Hub id like owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path_or_id, allow_patterns=HUB_PATTERNS))
    except Exception as e:  # the hub client raises dozens of kinds; each means the same to the user
        wrong = "is no folder here and could not be fetched from the Hub either"
        raise UserError(f"model_name_or_path: {path_or_id!r} {wrong}: {reason(e)}") from None


def open_folder(path_or_id: str) -> HFFolder:
    """Read config and safetensors headers of a model folder, Hub id or URL. Raises UserError listing all
    tensors that are missing, misshapen or of another dtype."""
    name = Path(path_or_id).name
    if not remote.is_url(path_or_id):
        folder = find_model(path_or_id)
        return _open(folder, name, None, _sizes(folder))
    store = remote.open_remote(path_or_id)
    sizes = store.names()
    if not sizes:
        raise UserError(f"model_name_or_path: no files at {store}; check the bucket's name and the path")
    small = [n for n in sizes if any(fnmatch.fnmatch(n, p) for p in HUB_PATTERNS) and not is_weights(n)]
    folder = remote.download(store, small)
    with remote.naming_url(folder, store):
        return _open(folder, name, store, sizes)


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}


def is_weights(name: str) -> bool:
    """Whether this is the name of a file of weights."""
    return name.endswith(".safetensors")


def _open(folder: Path, name: str, store: remote.Remote | None, sizes: Mapping[str, int]) -> HFFolder:
    config = read_config(folder)
    spec = parse_spec(config, str(folder / "config.json"))
    files = weight_files(folder, sizes)
    if store is None:
        headers = [read_header(folder / file) for file in files]
    else:
        headers = remote.in_parallel(lambda f: read_remote_header(store / f, sizes[f]), files)
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor, info in header.items():
            if tensor in tensors:  # an edit of one would leave the other as it was
                raise UserError(
                    f"{folder}: {tensors[tensor].file} and {info.file} both hold {tensor}; "
                    "leave one of the files, or one whose index names each tensor's file"
                )
            tensors[tensor] = info
    refuse(f"{folder}: the weights do not match config.json", _mismatches(spec, tensors), most=15)
    generation = folder / "generation_config.json"
    eos = eos_ids(config, read_config(generation) if generation.exists() else {})
    return HFFolder(folder, name, config, spec, tensors, eos, store)


def _mismatches(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """What differs between these tensors and those that the model needs, a line per tensor."""
    missing = []
    odd = [(name, info.dtype) for name, info in tensors.items() if info.dtype not in SIZES]
    wrong = [f"{name} has dtype {dtype}, which this program cannot copy" for name, dtype in odd]
    for row in weight_table(spec).values():
        for name in row.names():
            info = tensors.get(name)
            if info is None:
                missing.append(f"missing {name}")
            elif info.shape != row.shape:
                wrong.append(f"{name} is {list(info.shape)}, config.json implies {list(row.shape)}")
            elif info.dtype in SIZES.keys() - DTYPES.keys():
                wrong.append(f"{name} has dtype {info.dtype}, supported: {', '.join(DTYPES)}")
    return missing + wrong


def weight_files(folder: Path, present: Collection[str]) -> list[str]:
    """Names of the safetensors files among all that are `present`: those of the index, else
    `model.safetensors`, else all. Raises UserError for none and for a malformed index."""
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


def read_tensor(folder: HFFolder, name: str) -> np.ndarray:
    """One tensor as it is stored, HF layout and dtype."""
    return read_part(folder, name, (slice(None),) * len(folder.tensors[name].shape))


def read_part(folder: HFFolder, name: str, index: reading.Index) -> np.ndarray:
    """A part of a tensor, in HF layout and as it is stored."""
    info = folder.tensors[name]
    out = reading.empty(reading.part_shape(index, info.shape), np.dtype(NUMPY[info.dtype]))
    for job in reading.jobs(folder.source, info, index, out):
        job()
    return out

"""Hugging Face folders in and out: streaming load into sharded stacks, byte-exact save.

Loading reads the byte ranges that each device needs straight from the safetensors files; nothing
passes through torch. Saving rewrites only the files that hold edited tensors.
"""

import dataclasses
import fnmatch
import functools
import itertools
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from locft_jax import remote
from locft_jax.errors import UserError, is_panic
from locft_jax.files import whole_folder
from locft_jax.model import reading
from locft_jax.model.headers import SIZES, TensorInfo, read_header, read_remote_header
from locft_jax.model.quantize import Quantized, quantize_rows, row_scales
from locft_jax.model.sharding import fetch, make_mesh, place, tensor_sharding, weight_shardings
from locft_jax.model.spec import ModelSpec, eos_ids, parse_spec, read_config
from locft_jax.model.weights import Edits, Row, Weights, activation_dtype, locate_tensor, weight_table

if TYPE_CHECKING:
    from locft_jax.model.delta import Delta

DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
BLOCK = 2**21  # elements that are quantized at once by a thread
# Files beside the weights that make up a model folder; a Hub download takes these and no others.
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model folder that has been looked at but not loaded."""

    folder: Path  # of a model at a URL: a local copy of all but its weight files
    name: str
    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorInfo]  # every tensor of every file, by HF name
    eos: tuple[int, ...]
    store: remote.Remote | None = None  # where the files of a model at a URL are

    @property
    def place(self) -> Path | remote.Remote:
        """Where its weight files are, and what messages call it."""
        return self.store or self.folder

    def files(self) -> dict[str, int]:
        """Bytes of every file of the model, by name: those that an export takes over."""
        if self.store:
            found = self.store.names()
        else:
            found = {p.name: p.stat().st_size for p in self.folder.iterdir() if p.is_file()}
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


def open_checkpoint(path_or_id: str) -> Checkpoint:
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
) -> Checkpoint:
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
    return Checkpoint(folder, name, config, spec, tensors, eos, store)


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


def load_weights(
    checkpoint: Checkpoint, mesh: Mesh | None = None, dtype: Any = None, int8: bool = False
) -> Weights:
    """Stream the checkpoint onto the mesh: {key: [L, out, in] or [out, in]}, sharded by the table.

    Each device's callback reads its own byte ranges; host memory beyond the arrays is one shard.
    `dtype` None keeps the checkpoint's; with `int8` matrices are a Quantized, the rest is in `dtype`.
    """
    mesh = make_mesh() if mesh is None else mesh
    dtype = np.dtype(checkpoint.dtype if dtype is None else dtype)

    def callback(row: Row, index: tuple[slice, ...]) -> np.ndarray:
        names, inner = (row.names()[index[0]], index[1:]) if row.layers else ([row.hf], index)
        sizes = tuple(len(range(*s.indices(n))) for s, n in zip(inner, row.shape, strict=True))
        out = reading.empty((len(names), *sizes), dtype)
        blocks = (
            job
            for name, part in zip(names, out, strict=True)
            for job in reading.jobs(checkpoint.place, checkpoint.tensors[name], inner, part)
        )
        for done in [pool.submit(job) for job in blocks]:
            done.result()
        return out if row.layers else out[0]

    weights: Weights = {}
    table = weight_table(checkpoint.spec)
    with ThreadPoolExecutor(reading.threads(checkpoint.place)) as pool:
        for key, place in weight_shardings(mesh, checkpoint.spec, int8).items():
            if isinstance(place, Quantized):
                weights[key] = _load_int8(checkpoint, table[key], place, pool)
            else:
                block = functools.partial(callback, table[key])
                weights[key] = jax.make_array_from_callback(table[key].stacked, place, block)
    return weights


def _load_int8(checkpoint: Checkpoint, row: Row, place: Quantized, pool: ThreadPoolExecutor) -> Quantized:
    """A row of the table, quantized while it is read: host memory beyond one int8 shard is a few
    BLOCKs a thread.

    A scale is that of the whole row of the matrix, so a device that holds a part of the columns reads all
    of them, unless another has done so.
    """
    names, (height, width) = row.names(), row.shape
    scale = np.zeros((len(names), height), np.float32)  # 0: not known yet
    step = max(1, BLOCK // width)

    def values(index: Any) -> np.ndarray:
        rows, columns = index[-2:]
        some = range(height)[rows]
        layers = range(len(names))[index[0]] if row.layers else range(1)
        out = reading.empty((len(layers), len(some), len(range(width)[columns])), np.dtype(np.int8))

        def fill(i: int, start: int) -> None:
            own = some[start : start + step]
            part, of_rows = slice(own.start, own.stop), scale[layers[i], own.start : own.stop]
            if of_rows.all():
                block = read_part(checkpoint, names[layers[i]], (part, columns))
            else:
                block = read_part(checkpoint, names[layers[i]], (part, slice(None)))
                of_rows[:] = row_scales(block)
                block = block[:, columns]
            out[i, start : start + step] = quantize_rows(block, of_rows)

        blocks = itertools.product(range(len(layers)), range(0, len(some), step))
        list(pool.map(fill, *zip(*blocks, strict=True)))
        return out if row.layers else out[0]

    loaded = jax.make_array_from_callback(row.stacked, place.values, values)
    known = scale if row.layers else scale[0]
    return Quantized(loaded, jax.make_array_from_callback(known.shape, place.scale, known.__getitem__))


def read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """One tensor as the checkpoint stores it, HF layout and dtype."""
    info = checkpoint.tensors[name]
    return read_part(checkpoint, name, (slice(None),) * len(info.shape))


def read_part(checkpoint: Checkpoint, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, one slice a dimension, in HF layout and the checkpoint's dtype."""
    info = checkpoint.tensors[name]
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, info.shape, strict=True))
    out = reading.empty(shape, reading.NUMPY[info.dtype])
    for job in reading.jobs(checkpoint.place, info, index, out):
        job()
    return out


def read_raw(checkpoint: Checkpoint, name: str) -> bytes:
    """One tensor's bytes."""
    return read_tensor(checkpoint, name).tobytes()


def to_checkpoint_dtype(checkpoint: Checkpoint, edits: Edits) -> dict[str, np.ndarray]:
    """Edited tensors rounded to what the checkpoint stores: exactly what will be exported."""
    return {n: fetch(a).astype(DTYPES[checkpoint.tensors[n].dtype]) for n, a in edits.items()}


def save_hf(
    checkpoint: Checkpoint,
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
            elif name in rewritten or not (is_weights(name) and _link(checkpoint.folder / name, part)):
                shutil.copyfile(checkpoint.folder / name, part / name)
        for name, content in other.items():
            if content is not None:
                (part / name).write_bytes(content)
        for name, value in edited.items() if not checkpoint.store else ():
            info = checkpoint.tensors[name]
            with open(part / info.file, "r+b") as f:
                f.seek(info.begin)
                f.write(np.ascontiguousarray(value).tobytes())


def save_hf_at(
    checkpoint: Checkpoint,
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


def _pieces(checkpoint: Checkpoint, file: str, edited: Mapping[str, np.ndarray]) -> Iterator[bytes]:
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


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The folder's fast tokenizer. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((checkpoint.folder / n).exists() for n in names):
        raise UserError(f"{checkpoint.place}: no tokenizer (tokenizer.json) in this model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint.folder), trust_remote_code=False, local_files_only=True
        )
        tokenizer("a")  # some settings are only looked at here
    except BaseException as e:  # any failure means unusable files
        if not (isinstance(e, Exception) or is_panic(e)):
            raise
        reason = " ".join(str(e).replace(str(checkpoint.folder), str(checkpoint.place)).split())[:200]
        raise UserError(f"{checkpoint.place}: the tokenizer cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{checkpoint.place}: no fast tokenizer (tokenizer.json) in this model folder")
    return tokenizer


def with_eos(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """All ids that end an answer: config's, generation_config's and the tokenizer's."""
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return tuple(sorted({*checkpoint.eos, *own}))


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: frozen weights on a mesh, tokenizer, and the edits it carries (none at first)."""

    checkpoint: Checkpoint
    weights: Weights
    tokenizer: Any
    mesh: Mesh
    edits: Edits = dataclasses.field(default_factory=dict)  # HF name -> matrix in the weights' dtype

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def eos(self) -> tuple[int, ...]:
        return with_eos(self.checkpoint, self.tokenizer)

    @property
    def dtype(self) -> Any:
        """dtype of the activations, the edits, and the frozen weights unless those are int8."""
        return activation_dtype(self.weights)

    @property
    def int8(self) -> bool:
        """Whether the frozen matrices are int8."""
        return isinstance(self.weights["embed"], Quantized)

    def originals(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Of those tensors (HF names) that the model holds as int8, the checkpoint's own values."""
        held = {n: self.weights[locate_tensor(self.spec, n)[0].key] for n in names if n not in self.edits}
        return {n: read_tensor(self.checkpoint, n) for n, w in held.items() if isinstance(w, Quantized)}

    def with_edits(self, tensors: Mapping[str, np.ndarray | jax.Array], dtype: Any = None) -> "Model":
        """The same model with `tensors` (HF names and layout) in place of its own, in `dtype` (default:
        that of the weights); nothing is copied. What the checkpoint holds but no forward reads is left out.
        Raises KeyError for any other name."""
        placed = {}
        for name, value in tensors.items():
            try:
                row, _ = locate_tensor(self.spec, name)
            except KeyError:
                if name not in self.checkpoint.tensors:
                    raise
                continue
            sharding = tensor_sharding(self.mesh, self.spec, row, stacked=False)
            placed[name] = place(value.astype(dtype or self.dtype), sharding)
        return dataclasses.replace(self, edits={**self.edits, **placed})

    def apply(self, delta: "Delta") -> "Model":
        """The model with a delta's tensors in place; raises UserError if the delta was not made on this
        checkpoint."""
        from locft_jax.model.delta import check_delta

        check_delta(self.checkpoint, delta)
        return self.with_edits(delta.new)


def load_model(path_or_id: str, weights: str = "checkpoint", mesh: Mapping[str, int] | None = None) -> Model:
    """Open, check and load a model folder or Hub id. `weights`: the frozen weights' dtype
    (`checkpoint`, `float32`, `bfloat16`, `int8`); `mesh`: {data, model} sizes.

    Raises UserError for anything that is wrong with the folder, before weights are read.
    """
    checkpoint = open_checkpoint(path_or_id)
    tokenizer = load_tokenizer(checkpoint)
    return load_opened(checkpoint, tokenizer, make_mesh(mesh), weights)


def load_opened(checkpoint: Checkpoint, tokenizer: Any, mesh: Mesh, weights: str = "checkpoint") -> Model:
    """The model of a checkpoint that has been opened and checked."""
    loaded = load_weights(checkpoint, mesh, frozen_dtype(checkpoint, weights), weights == "int8")
    check_finite(checkpoint, loaded)
    return Model(checkpoint, loaded, tokenizer, mesh)


def frozen_dtype(checkpoint: Checkpoint, weights: str) -> np.dtype:
    """numpy dtype of the activations and frozen weights for the key `weights`; with `int8`, of the
    activations and norms."""
    given = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    return np.dtype(given.get(weights, checkpoint.dtype))


def check_finite(checkpoint: Checkpoint, weights: Weights) -> None:
    """Raise UserError naming the tensors that hold NaN or infinity (one pass over the weights)."""
    finite = jax.tree.map(fetch, _finite(checkpoint.spec, weights))
    bad = [
        name
        for key, row in weight_table(checkpoint.spec).items()
        for name, good in zip(row.names(), np.atleast_1d(finite[key]), strict=True)
        if not good
    ]
    if bad:
        lines = "\n  ".join(bad[:15]) + (f"\n  ... and {len(bad) - 15} more" if len(bad) > 15 else "")
        raise UserError(
            f"{checkpoint.place}: NaN or infinity (as {activation_dtype(weights)}) in these tensors; "
            f"fetch or make the model again:\n  {lines}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _finite(spec: ModelSpec, weights: Weights) -> dict[str, jax.Array]:
    """Whether all elements of each tensor are finite: {key: [L] or scalar, bool}. NaN or infinity less itself
    is NaN, and a sum keeps it (a maximum does not: XLA's on CPUs loses NaN). On a CPU `isfinite` of every
    element would take seven times as long, and memory for as many bools."""
    finite = {}
    for key, row in weight_table(spec).items():
        # A scale is finite when its row is.
        a = weights[key].scale if isinstance(weights[key], Quantized) else weights[key]
        finite[key] = jnp.sum(a - a, axis=tuple(range(bool(row.layers), a.ndim)), dtype=jnp.float32) == 0
    return finite

"""Will it fit? Bytes that a run needs on each device, against what is there, before anything is loaded.
Certain, a reason to refuse: the weights in their dtype, and the tuned state (float32 master, two Adam
moments, gradient). Rough, a reason to warn: what one step computes.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from locft_jax.data.packing import Corpus
from locft_jax.errors import UserError
from locft_jax.model.sharding import tensor_spec, width_split
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Row, locate_tensor, weight_table

SMALLEST_SITE = "model.layers.{}.mlp.down_proj.weight"


@dataclasses.dataclass(frozen=True)
class Step:
    """The size of one batch."""

    examples: int
    tokens: int  # of its packed rows
    length: int  # of a row
    targets: int  # positions
    first: int  # layer, from which on it is computed


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on each device."""

    weights: int
    tuned: int
    step: int

    @property
    def certain(self) -> int:
        return self.weights + self.tuned

    def __str__(self) -> str:
        parts = {"weights": self.weights, "tuned state": self.tuned, "about, for a step": self.step}
        return ", ".join(f"{as_text(size)} {name}" for name, size in parts.items() if size)


def step_of(corpus: Corpus, batch_size: int, row_length: int, first: int) -> Step:
    """A batch of mean examples, a tenth of its slots empty (packing fills more)."""
    examples = round(min(batch_size, corpus.edits) * len(corpus) / corpus.edits)
    length = max(row_length, int(corpus.lengths.max()))
    rows = math.ceil(1.1 * examples * float(corpus.lengths.mean()) / length)
    targets = math.ceil(examples * float(corpus.target_lengths.mean()))
    return Step(examples, rows * length, length, targets, first)


def estimate(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    itemsize: int,
    site: Sequence[str] = (),
    step: Step | None = None,
    int8: bool = False,
) -> Need:
    """What a device of a mesh of these `sizes` ({data, model}) holds; `itemsize`: bytes of an activation and
    of a frozen weight, those of matrices apart where they are `int8`.

    A step keeps, of every token and layer from `first` on, the outputs of the matrix products in the weights'
    dtype and its float32 attention scores; of every target the float32 logits and their gradient; and the
    largest of int8 matrices, which are converted one at a time. The compiler's own figure is 0.6 to 0.8 times
    that in float32 and, on a CPU, which computes bfloat16 in float32, twice that in bfloat16; the TPU's, of
    Qwen2.5-72B on 4 to 16 chips in bfloat16, 0.66 to 0.86 times (`locft plan`).
    """
    mesh = AbstractMesh((sizes["data"], sizes["model"]), ("data", "model"))

    def held(row: Row) -> int:
        split = "model" in tensor_spec(mesh, spec, row, stacked=False)
        return math.ceil(math.prod(row.shape) / (sizes["model"] if split else 1))

    def frozen(row: Row) -> int:
        return held(row) + held(row.scales()) * 4 if int8 and row.matrix else held(row) * itemsize

    table = weight_table(spec)
    weights = sum(frozen(row) * max(1, row.layers) for row in table.values())
    tuned = sum(held(locate_tensor(spec, name)[0]) for name in site) * 4 * np.dtype(np.float32).itemsize
    if step is None:
        return Need(weights, tuned, 0)
    q, kv, f, vocabulary = (held(table[key].scales()) for key in ("q", "k", "gate", "embed"))
    stream = spec.d_model // width_split(mesh, spec.d_model)
    token = (2 * q + 2 * kv + 2 * stream + 2 * f) * itemsize + q // spec.head_dim * step.length * 4
    used = (spec.n_layers - step.first) * math.ceil(step.tokens / sizes["data"]) * token
    largest = max(held(row) for row in table.values()) * itemsize if int8 else 0
    return Need(weights, tuned, used + step.targets * vocabulary * 2 * 4 + largest)


def check_memory(
    spec: ModelSpec,
    mesh: Mesh,
    itemsize: int,
    site: Sequence[str] = (),
    step: Step | None = None,
    room: "Room | None" = None,
    int8: bool = False,
) -> list[str]:
    """Warnings, of a step that may not fit. Raises UserError, with the smallest remedy, when weights and
    tuned state do not. `room`: what is free (default: measured)."""
    room = device_memory(mesh) if room is None else room
    need = estimate(spec, mesh.shape, itemsize, site, step, int8)
    where = f"on each of {mesh.size} device(s) ({need})"
    if need.certain > room.free:
        sizes = f"{as_text(need.certain)} are needed {where}, but {as_text(room.free)} are free"
        raise UserError(f"memory: {sizes}; {remedy(spec, mesh, itemsize, site, room, int8)}")
    if step is None or need.certain + need.step <= room.free:
        return []
    examples = step.examples
    while examples > 1 and need.certain + need.step * examples // step.examples > room.free:
        examples //= 2
    sizes = f"{as_text(need.certain + need.step)} {where}, {as_text(room.free)} are free"
    return [f"memory may not suffice: {sizes}; batch_size={examples} would be safer"]


def remedy(
    spec: ModelSpec, mesh: Mesh, itemsize: int, site: Sequence[str], room: "Room", int8: bool = False
) -> str:
    """What lets weights and tuned state fit: devices here, fewer bits, a smaller site, more devices."""
    now, count = mesh.shape["model"], jax.device_count()
    layers = [locate_tensor(spec, name)[1] for name in site]
    least = [SMALLEST_SITE.format(layers[0] or 0)] if site else []
    axes = [now] + [m for m in range(now + 1, count + 1) if count % m == 0 and not room.shared]
    kinds = [(itemsize, int8, "")]
    if not int8:
        kinds += [(min(itemsize, 2), False, "weights=bfloat16"), (itemsize, True, "weights=int8")]

    def certain(model: int, itemsize: int, int8: bool, site: Sequence[str]) -> int:
        return estimate(spec, {"data": 1, "model": model}, itemsize, site, None, int8).certain

    sites = (site, ""), (least, f"rewrite_module={SMALLEST_SITE} in one layer")
    for (names, tune), (size, quantized, dtype), model in itertools.product(sites, kinds, axes):
        if certain(model, size, quantized, names) <= room.free:
            axis = f"mesh={{data: {count // model}, model: {model}}}" if model != now else ""
            return "use " + " and ".join(filter(None, (axis, dtype, tune)))
    needed = as_text(certain(now, itemsize, True, least))
    powers = (2**k for k in range(1, 14) if 2**k > count)
    more = next((m for m in powers if certain(m, itemsize, True, least) <= room.free), None)
    devices = f", or {more} such devices with mesh={{data: 1, model: {more}}}" if more else ""
    return f"even weights=int8 and the smallest site need {needed} there{devices}"


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes free on each device; `shared`: they are the host's, and more devices bring no more."""

    free: int
    shared: bool


def device_memory(mesh: Mesh) -> Room:
    """What is free on the mesh's fullest device here; devices without own memory share the host's."""
    stats = [d.memory_stats() or {} for d in mesh.local_devices]
    if all("bytes_limit" in s for s in stats):
        return Room(min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats), False)
    return Room(host_memory() // len(stats), True)


def host_memory() -> int:
    """Bytes that this process may still take of the machine's memory, or of its container's if fewer."""
    free = [int(kib) * 1024 for kib in re.findall(r"MemAvailable: +(\d+)", _read("/proc/meminfo"))]
    stat = "" if free else _output("vm_stat")  # macOS
    if page := re.search(r"page size of (\d+) bytes", stat):
        pages = re.findall(r"Pages (?:free|inactive|speculative): +(\d+)", stat)
        free = [int(page[1]) * sum(map(int, pages))]
    for line in _read("/proc/self/cgroup").splitlines() or ["0::/"]:
        _, kinds, path = line.split(":", 2)
        if not kinds or "memory" in kinds.split(","):
            folder = Path(f"/sys/fs/cgroup/{'memory' if kinds else ''}{path}")
            # Where the container's own root is mounted its limit is at the top, whatever the path.
            groups = [folder, *folder.parents[: len(Path(path).parts) - 1]]
            free += [left for group in groups if (left := _group_memory(group, bool(kinds))) is not None]
    return min(free, default=2**63)  # unknown: never a reason to refuse


def _group_memory(group: Path, version_1: bool) -> int | None:
    """What a control group may still take, if it has a limit."""
    names = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
    limit, used = (_read(f"{group}/memory.{name}").strip() for name in names)
    if not (limit.isdecimal() and used.isdecimal()):
        return None
    stat = _read(f"{group}/memory.stat")  # files that are only cached can go
    cached = re.search(rf"^{'total_' if version_1 else ''}inactive_file (\d+)$", stat, re.MULTILINE)
    return int(limit) - int(used) + (int(cached[1]) if cached else 0)


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _output(command: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run([command], capture_output=True, text=True, check=False).stdout
    return ""


def as_text(size: int) -> str:
    """Bytes for people."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if size >= u / 10), (1024, "KiB"))
    return f"{size / unit:,.2f} {name}"


def memory_budgets(stated: float | None) -> tuple[float, float]:
    """Bytes that caches may take (on each device, on the host): those stated (GiB), else 80 % of the free."""
    if stated is not None:
        return stated * 2**30, stated * 2**30
    host = 0.8 * host_memory()
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return host / len(jax.local_devices()), host  # the devices are the host
    return 0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)), host

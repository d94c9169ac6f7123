"""Machines that are not here: which chips, how many, how they are wired, and what a chip can do.
`v5e:4x4` is a TPU slice by its shape, `v5e-8` by the name of its machine type (one host where the chips fit
one), `gpu:N` and `cpu:N` are devices that only arithmetic knows."""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator

import jax

from locft_jax.errors import UserError
from locft_jax.model.memory import host_memory

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has and does at most."""

    memory: float  # GiB
    flops: float = math.nan  # bfloat16 FLOP/s; NaN: not known


# Google Cloud's documentation, "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e", table of system architecture.
TPUS = {"v4": Chip(32, 275e12), "v5e": Chip(16, 197e12), "v5p": Chip(95, 459e12), "v6e": Chip(32, 918e12)}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SIZES = {"v4": CUBIC, "v5e": FLAT, "v5p": CUBIC, "v6e": FLAT}
GPU = Chip(80)  # a common size; --memory says otherwise


@dataclasses.dataclass(frozen=True)
class Topology:
    """`count` equal devices. `shape`: of a TPU slice; () for other devices."""

    name: str
    kind: str  # a key of TPUS, "gpu" or "cpu"
    chip: Chip
    count: int
    shape: tuple[int, ...] = ()
    one_host: bool = False

    @property
    def compiles(self) -> bool:
        """Whether libtpu compiles for it as it is used: of a v4 chip it knows the two halves only."""
        return bool(self.shape) and self.kind != "v4"

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return self.chip.memory * GIB


def _slices() -> Iterator[Topology]:
    """Every TPU slice, by its shape and by its machine type. There v4 and v5p count TensorCores, two a chip;
    their hosts have four chips, the others' eight."""
    for kind, sizes in SIZES.items():
        cores, host = (2, 4) if sizes is CUBIC else (1, 8)
        for size in sizes:
            shape = tuple(map(int, size.split("x")))
            found = Topology(f"{kind}:{size}", kind, TPUS[kind], math.prod(shape), shape)
            yield found
            machine = f"{kind}-{found.count * cores}"
            yield dataclasses.replace(found, name=machine, one_host=found.count <= host)


SLICES = {t.name: t for t in _slices()}


def parse_topology(text: str, memory: float | None = None) -> Topology:
    """What `text` names. `memory`: GiB a device, in place of the table's. Raises UserError."""
    found = SLICES.get(text)
    if other := re.fullmatch(r"(gpu|cpu):([1-9][0-9]{0,5})", text):
        kind, count = other[1], int(other[2])
        found = Topology(text, kind, GPU if kind == "gpu" else Chip(host_memory() / GIB / count), count)
    if found is None:
        names = [*(name for name in SLICES if ":" in name), "gpu:1", "cpu:1", "auto"]
        near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        slices = "; ".join(f"{kind}: {', '.join(sizes)}" for kind, sizes in SIZES.items())
        raise UserError(
            f"--topology: {text!r} is not known; {hint}It may be a TPU slice kind:shape ({slices}), a "
            "machine type (v5e-1, v5e-4, v5e-8, v6e-8: one host; v5e-16, v5p-8, ...), gpu:N, cpu:N, or auto"
        )
    return found if memory is None else dataclasses.replace(found, chip=Chip(memory, found.chip.flops))


def larger(topology: Topology) -> list[Topology]:
    """The next sizes of the same kind."""
    if topology.kind == "gpu":  # those of a CPU share the host's memory: more bring no more
        counts = [2 ** (topology.count.bit_length() + k) for k in range(8)]
        return [dataclasses.replace(topology, name=f"gpu:{count}", count=count) for count in counts]
    sizes = (t for name, t in SLICES.items() if t.kind == topology.kind and ":" in name)
    return [dataclasses.replace(t, chip=topology.chip) for t in sizes if t.count > topology.count]


def all_slices() -> list[Topology]:
    """Every TPU slice that can be compiled for, least memory in all first; 2x4 chips as one host."""
    every = [t for name, t in SLICES.items() if t.compiles and (":" in name) != (t.shape == (2, 4))]
    return sorted(every, key=lambda t: (t.count * t.memory, t.count))


def prepare_compiler() -> None:
    """Settings with which a machine without a TPU can compile for one; before JAX starts a backend. Raises
    UserError where the TPU compiler is not installed."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            "plan: the TPU's compiler (libtpu) is not installed here: pip install 'locft_jax[aot]'; "
            "without it only gpu:N and cpu:N can be planned, by arithmetic"
        ) from None
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # ask no metadata server which TPU this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing is run on a TPU: it may be in use
    # Unset, libtpu complains at length; what a topology is does not depend on them.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    jax.config.update("jax_platforms", "cpu")


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Devices of a slice that is not here, to compile for. Raises UserError where libtpu does not know it."""
    from jax.experimental import topologies

    options: dict[str, object] = {}
    if topology.one_host and topology.count > 4:  # by its own counting it would be two hosts
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    elif topology.count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"--topology: this libtpu does not know {name} ({str(e).splitlines()[0]})") from None
    return list(found.devices)

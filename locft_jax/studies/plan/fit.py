"""Does it fit? An edit on a topology: which mesh, what the compiler says, and where it would fit instead; as
tables for people, and as a record for programs."""

import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from typing import Any

from rich.console import Console

from locft_jax.evaluation.report import plain
from locft_jax.logs import log
from locft_jax.model.memory import Need, estimate, step_of
from locft_jax.model.sharding import make_mesh, resolve_sizes
from locft_jax.studies.plan.programs import Case, Program, product_flops, programs
from locft_jax.studies.plan.topology import GIB, Topology, tpu_devices
from locft_jax.studies.tables import print_table

SIZES = ("weights", "tuned", "held", "temporaries", "total", "headroom")
OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]?) of")  # what the TPU's compiler says


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes on each chip while a program runs, as its compiler has it. None: the program did not fit, and
    the compiler gave only the sum."""

    program: Program
    held: int | None  # inputs and outputs beside weights and tuned state, and what the run keeps meanwhile
    temporaries: int | None
    total: int
    flops: int  # of one call's matrix products, on all chips together
    seconds: float  # that the compilation took

    def at_least(self, topology: Topology) -> float:
        """Seconds of one call with every chip at its peak rate."""
        return self.flops / (topology.chip.flops * topology.count)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An edit on one topology with one mesh. `usages` is empty where only arithmetic spoke: `need`."""

    topology: Topology
    mesh: dict[str, int]
    need: Need
    usages: tuple[Usage, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of a chip that the largest program takes."""
        return max((u.total for u in self.usages), default=self.need.certain + self.need.step)

    @property
    def fits(self) -> bool:
        return self.total <= self.topology.memory and all(u.temporaries is not None for u in self.usages)

    @property
    def sure(self) -> str:
        return "" if self.usages else " by arithmetic"

    def sizes(self, usage: Usage | None) -> dict[str, float | None]:
        """Bytes a chip of one program; of `None` those of the training step by arithmetic."""
        parts, total = (usage.program, usage.total) if usage else (self.need, self.total)
        used = (usage.held, usage.temporaries) if usage else (None, self.need.step)
        sizes = (parts.weights, parts.tuned, *used, total, self.topology.memory - total)
        return dict(zip(SIZES, sizes, strict=True))

    def record(self) -> dict[str, Any]:
        """For `--json`: sizes in GiB a chip, times in seconds."""
        gib = lambda size: None if size is None else round(size / GIB, 3)  # noqa: E731
        return {
            "topology": self.topology.name,
            "chips": self.topology.count,
            "one_host": self.topology.one_host,
            "mesh": self.mesh,
            "chip_memory": gib(self.topology.memory),
            "arithmetic": {k: gib(getattr(self.need, k)) for k in ("weights", "tuned", "step")},
            "programs": [
                {
                    "program": u.program.name,
                    **{k: gib(size) for k, size in self.sizes(u).items()},
                    "flops": u.flops,
                    "seconds_at_least": u.at_least(self.topology),
                    "compile_seconds": round(u.seconds, 1),
                }
                for u in self.usages
            ],
            "total": gib(self.total),
            "fits": self.fits,
        }


def plan(case: Case, topology: Topology) -> Outcome:
    """The edit on this topology, with the first mesh of `meshes` that fits, else the one that comes nearest.
    A mesh that by arithmetic cannot hold weights and tuned state is compiled only if all are such."""
    ordered, tried = meshes(case, topology), list[Outcome]()
    if not topology.compiles:
        return ordered[0]
    for outcome in [o for o in ordered if o.need.certain <= topology.memory][:3] or ordered[:1]:
        tried.append(compile_all(case, outcome))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda o: o.total)


def smallest(case: Case, topologies: Iterable[Topology]) -> Outcome | None:
    """The first of `topologies` that the edit fits: those that by arithmetic do not are not compiled for."""
    hopeful = (t for t in topologies if min(o.total for o in meshes(case, t)) <= t.memory)
    return next((found for t in hopeful if (found := plan(case, t)).fits), None)


def meshes(case: Case, topology: Topology) -> list[Outcome]:
    """By arithmetic: every mesh over all chips, the config's own first if it fits, then by their memory."""
    step = step_of(case.corpus, case.config.batch_size, case.config.row_length, case.layer)
    count, own = topology.count, resolve_sizes(case.config.mesh, topology.count)

    def on(sizes: dict[str, int]) -> Outcome:
        need = estimate(case.spec, sizes, case.dtype.itemsize, case.site, step, case.int8)
        return Outcome(topology, sizes, need)

    shapes = [{"data": count // m, "model": m} for m in range(1, count + 1) if count % m == 0]
    found = sorted(map(on, shapes), key=lambda o: (o.total, -o.mesh["model"]))
    if own is not None and on(own).fits:
        return [on(own), *(o for o in found if o.mesh != own)]
    return found


def compile_all(case: Case, outcome: Outcome) -> Outcome:
    """The same with every program of the edit compiled for it."""
    topology, usages = outcome.topology, list[Usage]()
    for program in programs(case, make_mesh(outcome.mesh, tpu_devices(topology)), topology.memory):
        log.warning(f"{topology.name}, mesh {outcome.mesh}: compiling the {program.name}")
        usages.append(compiled(program))
    return dataclasses.replace(outcome, usages=tuple(usages))


def compiled(program: Program) -> Usage:
    """What the program takes on each chip, by the compiler of its devices."""
    begin, traced = time.monotonic(), program.trace()
    flops = product_flops(traced.jaxpr.jaxpr)
    try:
        stats = traced.lower().compile().memory_analysis()
    except RuntimeError as e:  # jax has no type of its own for this
        found = OUT_OF_MEMORY.search(str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or not found:
            raise
        total = int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) + program.beside
        return Usage(program, None, None, total, flops, time.monotonic() - begin)
    ends = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    held = ends - program.weights - program.tuned + program.beside
    temporaries = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    total = ends + program.beside + temporaries
    return Usage(program, held, temporaries, total, flops, time.monotonic() - begin)


def as_report(
    case: Case, outcome: Outcome | None, other: Outcome | None, notes: Sequence[str]
) -> dict[str, Any]:
    """The whole plan for `--json`; `other`: the smallest topology that fits, None where none does."""
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "model": case.config.model_name_or_path,
        "weights": case.weights,
        "site": list(case.site),
        "edits": case.edits,
        "batch_size": case.config.batch_size,
        "row_length": case.config.row_length,
        "tokens_an_edit": float(case.corpus.lengths.mean()),
        "notes": list(notes),
        "plan": outcome and outcome.record(),
        "smallest_that_fits": other and other.record(),
        "versions": {name: installed.get(name) for name in ("locft-jax", "jax", "jaxlib", "libtpu")},
    }


def print_plan(case: Case, outcome: Outcome | None, other: Outcome | None, console: Console) -> None:
    """The tables of `outcome`, and whether it fits, else where it would."""
    if outcome is None:
        return console.print("does not fit: no TPU slice known here is large enough")
    topology, config, mesh = outcome.topology, case.config, outcome.mesh
    about = f"{config.model_name_or_path}: {case.weights} weights, {case.edits:,} edits, {len(case.site)} "
    about += f"tensor(s) from {case.site[0]} on, batch {config.batch_size} in rows of {config.row_length}"
    console.print(plain(about))
    host = " of one host" if topology.one_host else ""
    where = f"{topology.name}: {topology.count} chip(s){host} of {topology.memory / GIB:.4g} GiB"
    console.print(f"{where}, mesh data {mesh['data']} x model {mesh['model']}")
    text = lambda size: "-" if size is None else f"{size / GIB:.2f}"  # noqa: E731
    rows, calls = list[dict[str, str]](), list[dict[str, str]]()
    for u in outcome.usages or (None,):
        name = {"program": u.program.name if u else "train step"}
        rows.append(name | {key: text(size) for key, size in outcome.sizes(u).items()})
        if u:
            work = {"TFLOP": f"{u.flops / 1e12:.1f}", "at least": f"{1000 * u.at_least(topology):.1f} ms"}
            calls.append(name | work | {"compiled": f"{u.seconds:.0f} s"})
    print_table("GiB a chip" if outcome.usages else "GiB a chip, by arithmetic", rows, console)
    if calls:
        print_table("one call", calls, console)
    console.print(verdict(outcome, other))


def verdict(outcome: Outcome, other: Outcome | None) -> str:
    """The last line."""
    if outcome.fits:
        left = (outcome.topology.memory - outcome.total) / GIB
        return f"fits{outcome.sure}: {outcome.total / GIB:.2f} GiB a chip, {left:.2f} GiB to spare"
    if other is None:
        return "does not fit, nor any larger topology of this kind that is known here"
    axes = f"mesh={{data: {other.mesh['data']}, model: {other.mesh['model']}}}"
    return f"does not fit: smallest topology that does{other.sure}: {other.topology.name} with {axes}"

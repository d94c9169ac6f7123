"""Does it fit? An edit on a topology: which mesh, what the compiler says, and where it would fit instead."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable

from locft_jax.model.memory import Need, estimate, step_of
from locft_jax.model.sharding import make_mesh, resolve_sizes
from locft_jax.studies.plan.case import Case
from locft_jax.studies.plan.programs import Program, product_flops, programs
from locft_jax.studies.plan.topology import Topology, tpu_devices

Say = Callable[[str], None]
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

    def at_least(self, topology: Topology) -> float | None:
        """Seconds of one call with every chip at its peak rate, None where that is not known."""
        peak = topology.chip.flops
        return None if peak is None else self.flops / (peak * topology.count)


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


def plan(case: Case, topology: Topology, say: Say) -> Outcome:
    """The edit on this topology, with the first mesh of `meshes` that fits, else the one that comes nearest.
    A mesh that by arithmetic cannot hold weights and tuned state is compiled only if all are such."""
    ordered = meshes(case, topology)
    if not topology.compiles:
        return ordered[0]
    hopeful = [o for o in ordered if o.need.certain <= topology.memory][:3] or ordered[:1]
    best: Outcome | None = None
    for outcome in hopeful:
        found = compile_all(case, outcome, say)
        if found.fits:
            return found
        best = found if best is None or found.total < best.total else best
    assert best is not None
    return best


def smallest(case: Case, topologies: Iterable[Topology], say: Say) -> Outcome | None:
    """The first of `topologies` that the edit fits: those that by arithmetic do not are not compiled for."""
    for topology in topologies:
        best = min(meshes(case, topology), key=lambda o: o.total)
        if best.total <= topology.memory:
            outcome = plan(case, topology, say)
            if outcome.fits:
                return outcome
    return None


def meshes(case: Case, topology: Topology) -> list[Outcome]:
    """By arithmetic: every mesh over all chips, the config's own first if it fits, then those that take
    least memory first."""
    step = step_of(case.corpus, case.config.batch_size, case.config.row_length, case.layer)
    count = topology.count

    def on(sizes: dict[str, int]) -> Outcome:
        need = estimate(case.spec, sizes, case.dtype.itemsize, case.site, step, case.int8)
        return Outcome(topology, sizes, need)

    shapes = [{"data": count // m, "model": m} for m in range(1, count + 1) if count % m == 0]
    found = sorted(map(on, shapes), key=lambda o: (o.total, -o.mesh["model"]))
    own = resolve_sizes(case.config.mesh, count)
    if own is not None and on(own).fits:
        found = [on(own), *(o for o in found if o.mesh != own)]
    return found


def compile_all(case: Case, outcome: Outcome, say: Say) -> Outcome:
    """The same with every program of the edit compiled for it."""
    topology = outcome.topology
    mesh = make_mesh(outcome.mesh, tpu_devices(topology))
    usages = []
    for program in programs(case, mesh, topology.memory):
        say(f"{topology.name}, mesh {outcome.mesh}: compiling the {program.name}")
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
    seconds = time.monotonic() - begin
    ends = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    held = ends - program.weights - program.tuned + program.beside
    temporaries = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return Usage(program, held, temporaries, ends + program.beside + temporaries, flops, seconds)

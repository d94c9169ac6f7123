"""Which sites are tried: modules by their short names, layers, and in what order. All strategies come as
rounds: what the next round measures may follow from the rounds before it."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from locft_jax.config import config_from_dict
from locft_jax.editing.site import find_site
from locft_jax.errors import UserError
from locft_jax.model.spec import ModelSpec
from locft_jax.studies.rule import best
from locft_jax.studies.tables import Line

# method.md, Where to tune: the modules studied in the paper, then the other projections.
MODULES = {
    "entire": "model.layers.{}",
    "attention": "model.layers.{}.self_attn",
    "mlp": "model.layers.{}.mlp",
    **{name: f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("up", "down", "gate")},
    **{name: f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
}
STUDIED = ("entire", "attention", "mlp", "up", "down")


@dataclasses.dataclass(frozen=True)
class Place:
    """One module of one layer."""

    layer: int
    module: str  # a name of MODULES, or a template
    template: str  # what `rewrite_module` would be
    tensors: tuple[str, ...]  # HF names

    @property
    def key(self) -> tuple[int, str]:
        return self.layer, self.module


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured. `every`: only each so many layers at first, then those between around the
    best; 1 measures all at once."""

    spec: ModelSpec
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    every: int = 1

    def places(self, modules: Sequence[str], layers: Iterable[int]) -> list[Place]:
        """Layer by layer from below, so that activations can be carried upward. Raises UserError."""
        pairs = [(MODULES.get(m, m), m, l) for l in sorted(layers) for m in modules]
        return [Place(l, m, template, find_site(self.spec, [template], [l])) for template, m, l in pairs]

    def describe(self) -> dict[str, Any]:
        """What tells one plan from another, in JSON types."""
        return {"modules": list(self.modules), "layers": list(self.layers), "every": self.every}

    def coarse(self) -> set[int]:
        """The layers of the first round."""
        return {*self.layers[:: self.every], self.layers[-1]}

    def size(self) -> str:
        """The number of sites, for people."""
        count = f"{len(self.modules)} module(s) in {len(self.coarse())} of {self.spec.n_layers} layers"
        return f"{count}, then the layers around the best" if self.every > 1 else count

    def all(self) -> list[Place]:
        """Every place that may be measured."""
        return self.places(self.modules, self.layers)

    def rounds(self, lines: Sequence[Line]) -> Iterator[tuple[str, list[Place]]]:
        """(name, places) of each round; `lines` grows by those of a round before the next is asked for."""
        yield "locating", self.places(self.modules, self.coarse())
        if self.every > 1:
            top = best(lines)
            at = self.layers.index(top["layer"])
            around = self.layers[max(0, at - self.every + 1) : at + self.every]
            yield "refining", self.places([top["module"]], set(around) - self.coarse())


def make_plan(
    spec: ModelSpec, modules: Sequence[str], layers: Sequence[int], strategy: str, sibling: Path | None
) -> Plan:
    """The plan that the command line asks for; without `modules` the studied ones, without `layers` all. With
    a `sibling` (sites.json of a smaller model): its recommended module at the same relative depth, alone."""
    if sibling is not None:
        module, layer = transfer(sibling, spec.n_layers)
        return Plan(spec, (module,), (layer,))
    names = tuple(dict.fromkeys(modules or STUDIED))
    for name in names:
        if name not in MODULES and name.count("{}") != 1:
            raise UserError(
                f"--modules: {name!r} is no module; name any of {' '.join(MODULES)}, or a template with {{}} "
                "for the layer, such as model.layers.{}.mlp.down_proj.weight"
            )
        config_from_dict({"rewrite_module": MODULES.get(name, name)}, "--modules")
    chosen = tuple(sorted(set(layers or range(spec.n_layers))))
    every = max(2, round(math.sqrt(len(chosen)))) if strategy == "coarse" and len(chosen) > 2 else 1
    return Plan(spec, names, chosen, every)


def transfer(sibling: Path, n_layers: int) -> tuple[str, int]:
    """(module, layer) at the relative depth that was recommended for a smaller model: its 7th of 28 layers
    becomes the 20th of 80 (layer 6 -> layer 19, method.md). Raises UserError for another file."""
    try:
        found = json.loads(sibling.read_text(encoding="utf-8"))
        one, depth = found["recommendation"], int(found["layers"])
        module, layer = str(one["module"]), int(one["layer"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = getattr(e, "strerror", None) or "it is no sites.json that locate wrote"
        raise UserError(f"--from-sibling: {sibling} cannot be used ({why})") from None
    if not 0 <= layer < depth:
        raise UserError(f"--from-sibling: {sibling} recommends layer {layer} of {depth} layers")
    return module, max(0, round((layer + 1) / depth * n_layers) - 1)

"""Which sites are tried: modules by their short names, layers, and in what order.

All strategies come as rounds: what the next round measures may follow from the rounds before it.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from locft_jax.config import config_from_dict
from locft_jax.editing.site import find_site
from locft_jax.errors import UserError
from locft_jax.model.spec import ModelSpec
from locft_jax.studies.locate.rule import best
from locft_jax.studies.tables import Line

# method.md, Where to tune: the modules studied in the paper, then the other projections.
MODULES = {
    "entire": "model.layers.{}",
    "attention": "model.layers.{}.self_attn",
    "mlp": "model.layers.{}.mlp",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
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

    def places(self, modules: Sequence[str], layers: Sequence[int]) -> list[Place]:
        """Layer by layer from below, so that activations can be carried upward."""
        return [place(self.spec, m, l) for l in sorted(layers) for m in modules]

    def told(self) -> dict[str, Any]:
        """What tells one plan from another, in JSON types."""
        return {"modules": list(self.modules), "layers": list(self.layers), "every": self.every}

    def size(self) -> str:
        """The number of sites, for people."""
        first = {*self.layers[:: self.every], self.layers[-1]}
        count = f"{len(self.modules)} module(s) in {len(first)} of {self.spec.n_layers} layers"
        return f"{count}, then the layers around the best" if self.every > 1 else count

    def all(self) -> list[Place]:
        """Every place that may be measured."""
        return self.places(self.modules, self.layers)

    def rounds(self, lines: Sequence[Line]) -> Iterator[tuple[str, list[Place]]]:
        """(name, places) of each round; `lines` grows by those of a round before the next is asked for."""
        coarse = {*self.layers[:: self.every], self.layers[-1]}
        yield "locating", self.places(self.modules, sorted(coarse))
        if self.every > 1:
            top = best(lines)
            at = self.layers.index(top["layer"])
            around = self.layers[max(0, at - self.every + 1) : at + self.every]
            yield "refining", self.places([top["module"]], sorted(set(around) - coarse))


def place(spec: ModelSpec, module: str, layer: int) -> Place:
    """Raises UserError for a module that the model does not have."""
    template = MODULES.get(module, module)
    return Place(layer, module, template, find_site(spec, [template], [layer]))


def make_plan(
    spec: ModelSpec,
    modules: Sequence[str] | None,
    layers: Sequence[int] | None,
    strategy: str,
    sibling: Path | None,
) -> Plan:
    """The plan that the command line asks for. With a `sibling` (sites.json of a smaller model): its
    recommended module at the same relative depth, alone. Raises UserError for what this model lacks."""
    if sibling is not None:
        module, layer = transfer(sibling, spec.n_layers)
        return _checked(Plan(spec, (module,), (layer,)))
    names = tuple(dict.fromkeys(modules or STUDIED))
    for name in names:
        if name not in MODULES:
            _check_template(name)
    chosen = tuple(sorted(set(range(spec.n_layers) if layers is None else layers)))
    every = max(2, round(math.sqrt(len(chosen)))) if strategy == "coarse" else 1
    return _checked(Plan(spec, names, chosen, every if len(chosen) > 2 else 1))


def _checked(plan: Plan) -> Plan:
    plan.all()
    return plan


def _check_template(name: str) -> None:
    if name.count("{}") != 1:
        raise UserError(
            f"--modules: {name!r} is no module; name any of {' '.join(MODULES)}, or a template with {{}} for "
            "the layer, such as model.layers.{}.mlp.down_proj.weight"
        )
    config_from_dict({"rewrite_module": name}, "--modules")


def transfer(sibling: Path, n_layers: int) -> tuple[str, int]:
    """(module, layer) at the relative depth that was recommended for a smaller model: its 7th of 28 layers
    becomes the 20th of 80 (layer 6 -> layer 19, method.md). Raises UserError for a file that is none of
    locate's."""
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

"""What a run is: a frozen `Config`, read from flat YAML and `--set key=value`. All checks are here.

Keys that the reference implementation of LocFT-BF has keep its names, so its hparams files run
unchanged. Anything wrong is a `UserError` that names the place, the key, the value and the remedy.
"""

import difflib
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from locft_jax.errors import UserError
from locft_jax.flat_yaml import is_null, read_yaml, shown, split_override
from locft_jax.logs import say

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_CONFIG = DEMO_FOLDER / "demo.yaml"

# Keys accepted for the sake of existing files: a run prints the note and does nothing else.
IGNORED = {"device": "JAX uses every device it finds (JAX_PLATFORMS chooses the kind, `mesh` the layout)"}


@dataclass(frozen=True)
class Config:
    """One run. Values are converted and checked on construction, from Python too.

    Paths are relative to the working directory; `demo:NAME` is a file of the bundled demo.
    Raises `UserError` for a bad value.
    """

    model_name_or_path: str = ""  # folder or Hub id; empty only where the caller brings a model
    data_path: str | None = None  # edits: file or Hub id
    num_edits: int | None = None  # the first n; None = all
    save_model_dir: str | None = None  # default of --out; None = runs/NAME
    layer: int | tuple[int, ...] | None = None  # from 0; None = relative depth 0.7
    rewrite_module: str | tuple[str, ...] = "model.layers.{}.mlp.down_proj.weight"
    lr: float = 5e-4
    batch_size: int = 100  # edits a step
    num_steps: int = 25  # epochs at most (the reference's name)
    weight_decay: float = 0.0  # L2 inside Adam, as in the reference
    device: str | None = None  # ignored with a note
    seed: int = 0
    loss_average: str = "example"  # or token
    loss_floor: float = 1e-2  # below it a batch makes no step and an epoch ends the run
    pipeline: str = "breadth"  # or depth: each mini-batch to convergence in turn, num_steps steps at most
    method: str = "ft-m"  # or ft-l: loss on the last target token only
    norm_constraint: float | None = None  # most that an element of a tuned tensor may change
    append_eos: bool = True
    chat_template: bool = False
    on_conflict: str = "keep"  # one prompt, several targets: keep, last, error
    weights: str = "checkpoint"  # dtype of the frozen weights
    mesh: Mapping[str, int] = field(default_factory=lambda: {"data": 1, "model": -1}, hash=False)
    row_length: int = 64  # tokens a packed row (longer where an edit is longer)
    prefix_cache: str = "auto"  # or device, host, disk, off
    memory_budget: float | None = None  # GiB for caches; None = 80 % of what is free
    evaluate: bool = True
    eval_sample: int | None = None  # probes of each kind; None = all
    eval_every: int | None = None  # epochs (depth: mini-batches) between evaluations; None = never
    capability_data: tuple[str, ...] = ()  # files
    checkpoint_every: str = "10m"  # minutes (10m), or steps (200)
    export: tuple[str, ...] = ("hf", "delta", "orbax")
    preserve: str = "none"  # or soft, null, kfac: updates avoid inputs that other texts have
    preserve_strength: float | None = None  # soft, kfac: > 0; null: a share of the trace, in (0, 1)
    preserve_data: str | None = None  # model (the default), templates, or a file of texts
    preserve_tokens: str = "all"  # or last: of a retained text only what follows its last token is to stay
    preserve_kl: float | None = None  # weight of KL(base || edited) on the retained texts; 0 = off
    augment_prefixes: int = 0  # times that an edit is also trained after a random text
    augment_data: str | None = None  # file of such texts; None: the model writes them
    augment_rephrases: int = 0  # given rephrases that are trained too, and then not asked
    source: str = field(default="", repr=False, compare=False)  # the file read; not a key

    def __post_init__(self) -> None:
        for key in _RULES:
            object.__setattr__(self, key, _checked(key, getattr(self, key), "Config"))
        if self.eval_every is not None and not self.evaluate:
            raise UserError(f"Config: `eval_every: {self.eval_every}` needs evaluate: true")
        strength = self.preserve_strength
        if self.preserve == "null" and strength is not None and strength >= 1:
            raise UserError(
                f"Config: `preserve_strength: {shown(strength)}` is not valid; with preserve=null it must "
                "be a number > 0 and < 1"
            )

    @property
    def name(self) -> str:
        """Name of the run: the config file's stem, else the model's last path component."""
        if self.source:
            return Path(self.source).stem
        model = Path(self.model_name_or_path)
        name = model.name if model.name not in ("", "..") else model.resolve().name
        return name or "model"


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), earlier: Mapping[str, Any] | None = None
) -> Config:
    """The `Config` of a YAML file (None: defaults, or the keys of an `earlier` run) with `key=value`
    overrides, later ones winning.

    The bundled demo's file is read when neither `path` nor a model is given, and only then.
    Prints a note for a key that is accepted but does nothing. Raises `UserError`.
    """
    changes = [split_override(text) for text in overrides]
    if path is None and earlier is None and all(key != "model_name_or_path" for key, _ in changes):
        path = DEMO_CONFIG
    values = dict(earlier or {}) if path is None else _checked_all(read_yaml(path), str(path))
    for key, value in changes:
        values |= _checked_all({key: value}, "--set")
    if not values.get("model_name_or_path"):
        where = path if path is not None else "--set"
        raise UserError(f"{where}: no model; set `model_name_or_path` to a folder or a Hub id")
    for key, note in IGNORED.items():
        if values.get(key) is not None:
            say(f"`{key}: {shown(values[key])}` is ignored: {note}")
    return Config(**values, source="" if path is None else str(path))


def config_from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The `Config` of plain values. `where` names their origin in a `UserError`."""
    return Config(**_checked_all(values, where))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Every key in plain YAML / JSON types; `config_from_dict` gives an equal `Config` back."""
    values = {key: getattr(config, key) for key in _RULES}
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    return values | {"mesh": dict(config.mesh)}


def resolve_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    """Tuned layers of a model with `num_layers`, ascending, counted from 0.

    Without a `layer` it is relative depth 0.7, the paper's choice for Llama-3-8B (22 of 32).
    Raises `UserError` for a layer that the model does not have.
    """
    if config.layer is None:
        return (7 * num_layers // 10,)
    layers = (config.layer,) if isinstance(config.layer, int) else config.layer
    outside = [layer for layer in layers if layer >= num_layers]
    if outside:
        raise UserError(
            f"`layer: {shown(config.layer)}` is out of range: {shown(outside)}; "
            f"the model has {num_layers} layers, 0 to {num_layers - 1}"
        )
    return tuple(sorted(layers))


# ---------------------------------------------------------------- what each key may be


class _Rule(NamedTuple):
    expected: str  # completes "it must be ..."
    convert: Callable[[Any], Any]  # text or Python value -> value; ValueError or TypeError if bad


_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _text(value: Any) -> str:
    value = os.fspath(value)
    if not isinstance(value, str) or not value.strip() or min(value) < " ":
        raise ValueError
    value.encode()  # a lone surrogate could not be written to a report
    return value


def _path(value: Any) -> str:
    text = _text(value)
    if text.startswith("demo:"):
        return str(DEMO_FOLDER / text.removeprefix("demo:"))
    return os.path.expanduser(text)


def _module(value: Any) -> str:
    text = _text(value)
    parts = text.split(".")
    if parts.count("{}") > 1 or not all(p == "{}" or re.fullmatch(r"[\w-]+", p) for p in parts):
        raise ValueError
    return text


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _SWITCHES:
        raise ValueError
    return _SWITCHES[str(value).lower()]


def _every(value: Any) -> str:
    text = str(operator.index(value)) if isinstance(value, int) else str(value).replace(" ", "")
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}|[0-9]{1,6}(\.[0-9]{1,3})?m(in)?", text):
        raise ValueError
    if not float(text.rstrip("min")):
        raise ValueError
    return text.removesuffix("in") if text.endswith("in") else text


def _mesh(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping) or set(value) != {"data", "model"}:
        raise ValueError
    axis = _whole(-1).convert
    shape = {name: axis(value[name]) for name in ("data", "model")}
    if 0 in shape.values() or list(shape.values()) == [-1, -1]:
        raise ValueError
    return shape


def _whole(low: int, high: int = 2**31 - 1) -> _Rule:
    def convert(value: Any) -> int:
        number = int(value) if isinstance(value, str) else operator.index(value)
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError
        return number

    return _Rule(f"a whole number from {low} to {high}", convert)


def _real(low: float, *, above: bool = False) -> _Rule:
    def convert(value: Any) -> float:
        number = float(value)
        small = number <= low if above else number < low
        if isinstance(value, bool) or not math.isfinite(number) or small:
            raise ValueError
        return number

    return _Rule(f"a number {'>' if above else '>='} {low:g}", convert)


def _choice(*names: str) -> _Rule:
    def convert(value: Any) -> str:
        value = "off" if value is False else value  # how YAML 1.1 readers spell `off`
        if value not in names:
            raise ValueError
        return str(value)

    return _Rule("one of " + ", ".join(names), convert)


def _optional(rule: _Rule) -> _Rule:
    return _Rule(rule.expected + ", or null", lambda v: None if is_null(v) else rule.convert(v))


def _distinct(rule: _Rule, values: Sequence[Any]) -> tuple[Any, ...]:
    items = tuple(rule.convert(v) for v in values)
    if len(set(items)) != len(items):
        raise ValueError
    return items


def _one_or_more(rule: _Rule) -> _Rule:
    def convert(value: Any) -> Any:
        if isinstance(value, list | tuple) and value:
            return _distinct(rule, value)
        return rule.convert(value)

    return _Rule(f"{rule.expected}, or a list of such without duplicates", convert)


def _any_number(rule: _Rule) -> _Rule:
    def convert(value: Any) -> tuple[Any, ...]:
        single = [] if is_null(value) else [value]
        return _distinct(rule, value if isinstance(value, list | tuple) else single)

    return _Rule(f"{rule.expected}, or a list of such without duplicates, or []", convert)


_TEXT = _Rule("text", _text)
_PATH = _Rule("a path or an id", _path)
_SWITCH = _Rule("true or false", _switch)
_MODEL = _Rule("a folder or a Hub id", lambda v: "" if is_null(v) else _path(v))
_DEVICE = _Rule("a device", lambda v: _text(str(v) if isinstance(v, int) else v))
_MODULE = _Rule(
    "a path of whole components with at most one {} for the layer, such as "
    "model.layers.{}.mlp.down_proj.weight",
    _module,
)
_MESH = _Rule("{data: n, model: m} with n and m >= 1, one of them -1 for all the rest", _mesh)

_RULES: dict[str, _Rule] = {
    "model_name_or_path": _MODEL,
    "data_path": _optional(_PATH),
    "num_edits": _optional(_whole(1)),
    "save_model_dir": _optional(_PATH),
    "layer": _optional(_one_or_more(_whole(0))),
    "rewrite_module": _one_or_more(_MODULE),
    "lr": _real(0, above=True),
    "batch_size": _whole(1),
    "num_steps": _whole(1),
    "weight_decay": _real(0),
    "device": _optional(_DEVICE),
    "seed": _whole(0, 2**32 - 1),
    "loss_average": _choice("example", "token"),
    "loss_floor": _real(0),
    "pipeline": _choice("breadth", "depth"),
    "method": _choice("ft-m", "ft-l"),
    "norm_constraint": _optional(_real(0, above=True)),
    "append_eos": _SWITCH,
    "chat_template": _SWITCH,
    "on_conflict": _choice("error", "last", "keep"),
    "weights": _choice("checkpoint", "float32", "bfloat16", "int8"),
    "mesh": _MESH,
    "row_length": _whole(1),
    "prefix_cache": _choice("auto", "device", "host", "disk", "off"),
    "memory_budget": _optional(_real(0, above=True)),
    "evaluate": _SWITCH,
    "eval_sample": _optional(_whole(1)),
    "eval_every": _optional(_whole(1)),
    "capability_data": _any_number(_PATH),
    "checkpoint_every": _Rule("minutes such as 10m, or a number of steps", _every),
    "export": _any_number(_choice("hf", "delta", "orbax")),
    "preserve": _choice("none", "soft", "null", "kfac"),
    "preserve_strength": _optional(_real(0, above=True)),
    "preserve_data": _optional(_PATH),
    "preserve_tokens": _choice("all", "last"),
    "preserve_kl": _optional(_real(0)),
    "augment_prefixes": _whole(0, 1000),
    "augment_data": _optional(_PATH),
    "augment_rephrases": _whole(0),
}

# What other trainers call a key that spelling alone would not find.
_SYNONYMS = {"learning_rate": "lr", "epochs": "num_steps", "num_epochs": "num_steps"}


def _checked(key: str, value: Any, where: str) -> Any:
    expected, convert = _RULES[key]
    try:
        converted, valid = convert(value), True
    except (ValueError, TypeError, OverflowError):
        converted, valid = None, False
    if not valid:
        raise UserError(f"{where}: `{key}: {shown(value)}` is not valid; it must be {expected}")
    return converted


def _checked_all(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in values:
        if key not in _RULES:
            near = difflib.get_close_matches(str(key), _RULES, n=1, cutoff=0)[0]
            near = _SYNONYMS.get(key, near)
            raise UserError(f"{where}: unknown key `{shown(key)}`; the nearest known key is `{near}`")
    return {key: _checked(key, value, where) for key, value in values.items()}

"""What a run is: a frozen `Config`, read from flat YAML and `key=value` overrides. A key's rule and its
meaning stand with the key.

Keys of the reference implementation of LocFT-BF are valid under its names too, so its hparams files run
unchanged. Anything wrong is a `UserError` that names the place, the key, the value and the remedy.
"""

import difflib
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from locft_jax.errors import UserError
from locft_jax.flat_yaml import is_null, read_yaml, shown, split_override
from locft_jax.logs import log

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_CONFIG = DEMO_FOLDER / "demo.yaml"

# Keys accepted for the sake of existing files: a run prints the note and does nothing else.
IGNORED = {"device": "JAX uses every device it finds (JAX_PLATFORMS chooses the kind, `mesh` the layout)"}

OVERRIDES = "command line"  # how messages name the place of `key=value` arguments

# ---------------------------------------------------------------- what a key may be


class Rule(NamedTuple):
    """What values a key takes."""

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
    inside = text.removeprefix("demo:")
    return os.path.expanduser(text) if inside == text else str(DEMO_FOLDER / inside)


def _module(value: Any) -> str:
    text = _text(value)
    if text.count("{}") > 1 or not re.fullmatch(r"([\w-]+|\{\})(\.([\w-]+|\{\}))*", text):
        raise ValueError
    return text


def _every(value: Any) -> str:
    text = str(operator.index(value)) if isinstance(value, int) else str(value).replace(" ", "")
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}|[0-9]{1,6}(\.[0-9]{1,3})?m(in)?", text):
        raise ValueError
    if not float(text.rstrip("min")):
        raise ValueError
    return text.removesuffix("in") if text.endswith("in") else text


def _mesh(value: Any) -> dict[str, int]:
    shape = {name: _whole(-1).convert(value[name]) for name in ("data", "model")}
    if len(value) > 2 or 0 in shape.values() or list(shape.values()) == [-1, -1]:
        raise ValueError
    return shape


def _whole(low: int, high: int = 2**31 - 1) -> Rule:
    def convert(value: Any) -> int:
        number = int(value) if isinstance(value, str) else operator.index(value)
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError
        return number

    return Rule(f"a whole number from {low} to {high}", convert)


def _real(low: float, *, above: bool = False) -> Rule:
    def convert(value: Any) -> float:
        number = float(value)
        small = number <= low if above else number < low
        if isinstance(value, bool) or not math.isfinite(number) or small:
            raise ValueError
        return number

    return Rule(f"a number {'>' if above else '>='} {low:g}", convert)


def _choice(*names: str) -> Rule:
    def convert(value: Any) -> str:
        value = "off" if value is False else value  # how YAML 1.1 readers spell `off`
        if value not in names:
            raise ValueError
        return str(value)

    return Rule("one of " + ", ".join(names), convert)


def _optional(rule: Rule) -> Rule:
    return Rule(rule.expected + ", or null", lambda v: None if is_null(v) else rule.convert(v))


def _several(rule: Rule, least: int = 0) -> Rule:
    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return rule.convert(value) if least else () if is_null(value) else (rule.convert(value),)
        items = tuple(rule.convert(v) for v in value)
        if len(set(items)) != len(items) or len(items) < least:
            raise ValueError
        return items

    return Rule(f"{rule.expected}, or a list of such without duplicates{'' if least else ', or []'}", convert)


PATH = Rule("a path or an id", _path)
SWITCH = Rule("true or false", lambda v: _SWITCHES[str(v).lower()])
MODEL = Rule("a folder or a Hub id", lambda v: "" if is_null(v) else _path(v))
DEVICE = _optional(Rule("a device", lambda v: _text(str(v) if isinstance(v, int) else v)))
MODULE = Rule("a path of whole components with at most one {} for the layer, such as "
              "model.layers.{}.mlp.down_proj.weight", _module)  # fmt: skip
MESH = Rule("{data: n, model: m} with n and m >= 1, one of them -1 for all the rest", _mesh)
PATH_OR_NULL, COUNT_OR_NULL = _optional(PATH), _optional(_whole(1))
POSITIVE = _real(0, above=True)
POSITIVE_OR_NULL = _optional(POSITIVE)
EVERY = Rule("minutes such as 10m, or a number of steps", _every)

# ---------------------------------------------------------------- the keys


def key(default: Any, rule: Rule, doc: str, alias: str = "") -> Any:
    """A key of `Config`: its default, what it may be, what it means, and another name that is valid too."""
    known = {"rule": rule, "doc": doc, "alias": alias}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), hash=False, metadata=known)
    return field(default=default, metadata=known)


@dataclass(frozen=True)
class Config:
    """One run. Values are converted and checked on construction, from Python too; every key may be given by
    its alias there, and is read by its name.

    Paths are relative to the working directory; `demo:NAME` is a file of the bundled demo.
    Raises `UserError` for a bad value.
    """

    # fmt: off
    model_name_or_path: str = key("", MODEL, "folder or Hub id", "model")
    data_path: str | None = key(None, PATH_OR_NULL, "edits: a file or a Hub data set")
    num_edits: int | None = key(None, COUNT_OR_NULL, "the first n edits; null: all")
    output_dir: str | None = key(None, PATH_OR_NULL, "default `--out`; null: `runs/NAME`", "save_model_dir")
    layer: int | tuple[int, ...] | None = key(None, _optional(_several(_whole(0), 1)),
        "layer or layers, from 0; null: relative depth 0.7")
    rewrite_module: str | tuple[str, ...] = key("model.layers.{}.mlp.down_proj.weight", _several(MODULE, 1),
        "what is tuned in them: whole path components; `model.layers.{}` is the entire layer")
    learning_rate: float = key(5e-4, POSITIVE, "of Adam", "lr")
    batch_size: int = key(100, _whole(1), "edits a step")
    num_epochs: int = key(25, _whole(1), "epochs at most", "num_steps")
    weight_decay: float = key(0.0, _real(0), "L2 inside Adam, as in the reference")
    device: str | None = key(None, DEVICE, "accepted, ignored with a note")
    seed: int = key(0, _whole(0, 2**32 - 1), "of the order of edits, of samples and texts")
    loss_average: str = key("example", _choice("example", "token"), "what the mean loss of a batch is over")
    loss_floor: float = key(1e-2, _real(0), "below it a batch makes no step and an epoch ends the run")
    pipeline: str = key("breadth", _choice("breadth", "depth"),
        "`depth`: each mini-batch to convergence in turn, `num_epochs` steps at most")
    method: str = key("ft-m", _choice("ft-m", "ft-l"), "`ft-l`: loss on the last target token only")
    norm_constraint: float | None = key(None, POSITIVE_OR_NULL, "most that an element of the site may change")
    append_eos: bool = key(True, SWITCH, "the end of the answer is trained too")
    chat_template: bool = key(False, SWITCH, "prompts are put into the tokenizer's chat template")
    on_conflict: str = key("keep", _choice("error", "last", "keep"), "of one prompt with several targets")
    weights: str = key("checkpoint", _choice("checkpoint", "float32", "bfloat16", "int8"),
        "dtype of the frozen weights")
    mesh: Mapping[str, int] = key({"data": 1, "model": -1}, MESH, "layout of the devices")
    row_length: int = key(64, _whole(1), "tokens a packed row (longer where an edit is longer)")
    activation_cache: str = key("auto", _choice("auto", "device", "host", "disk", "off"),
        "where the activations that enter the site are kept", "prefix_cache")
    memory_budget: float | None = key(None, POSITIVE_OR_NULL, "GiB for caches; null: 80 % of what is free")
    evaluate: bool = key(True, SWITCH, "every probe is asked before and after")
    eval_sample: int | None = key(None, COUNT_OR_NULL, "probes of each kind; null: all")
    eval_every: int | None = key(None, COUNT_OR_NULL,
        "epochs (depth: mini-batches) between evaluations; null: never")
    capability_data: tuple[str, ...] = key((), _several(PATH), "files of questions that no edit is about")
    checkpoint_every: str = key("10m", EVERY, "minutes (`10m`) or steps (`200`)")
    export: tuple[str, ...] = key(("hf", "delta", "orbax"), _several(_choice("hf", "delta", "orbax")),
        "what is written")
    report_to: tuple[str, ...] = key((), _several(_choice("tensorboard", "wandb")),
        "where the losses of steps are shown too")
    preserve: str = key("none", _choice("none", "soft", "null", "kfac"),
        "updates avoid the inputs that other texts have")
    preserve_strength: float | None = key(None, POSITIVE_OR_NULL,
        "`soft`, `kfac`: > 0; `null`: a share of the trace, in (0, 1)")
    preserve_data: str | None = key(None, PATH_OR_NULL, "`model` (default), `templates`, or a file of texts")
    preserve_tokens: str = key("all", _choice("all", "last"),
        "`last`: of a retained text only what follows its last token is to stay")
    preserve_kl: float | None = key(None, _optional(_real(0)),
        "weight of the KL divergence from the base on the retained texts; 0: off")
    augment_prefixes: int = key(0, _whole(0, 1000), "times that an edit is also trained after a random text")
    augment_data: str | None = key(None, PATH_OR_NULL, "file of such texts; null: the model writes them")
    augment_rephrases: int = key(0, _whole(0), "given rephrases that are trained too, and then not asked")
    # fmt: on
    source: str = field(default="", repr=False, compare=False)  # the file read; not a key

    def __post_init__(self) -> None:
        for name in KEYS:
            object.__setattr__(self, name, _checked(name, getattr(self, name), "Config"))
        if self.eval_every is not None and not self.evaluate:
            raise UserError(f"Config: `eval_every: {self.eval_every}` needs evaluate: true")
        strength = self.preserve_strength
        if self.preserve == "null" and strength is not None and strength >= 1:
            wrong = (
                f"Config: `preserve_strength: {shown(strength)}` is not valid; with preserve=null it must be"
            )
            raise UserError(f"{wrong} a number > 0 and < 1")

    @property
    def name(self) -> str:
        """Name of the run: the config file's stem, else the model's last path component."""
        if self.source:
            return Path(self.source).stem
        model = Path(self.model_name_or_path)
        name = model.name if model.name not in ("", "..") else model.resolve().name
        return name or "model"


KEYS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(Config) if f.metadata}
ALIASES: dict[str, str] = {known["alias"]: name for name, known in KEYS.items() if known["alias"]}
# What other trainers call a key that spelling alone would not find.
_SYNONYMS = {"epochs": "num_epochs", "max_epochs": "num_epochs", "output": "output_dir"}


_init = Config.__init__


def _init_by_any_name(self: Config, *args: Any, **values: Any) -> None:
    # An alias wins: dataclasses.replace gives the old value by its name beside it.
    by_alias = {ALIASES[name]: values.pop(name) for name in [*values] if name in ALIASES}
    _init(self, *args, **(values | by_alias))


Config.__init__ = _init_by_any_name  # type: ignore[method-assign]  # type checkers see the names


def canonical(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same values with aliases replaced by the keys' names. Raises UserError for a key that is given
    twice."""
    for alias, name in ALIASES.items():
        if alias in values and name in values:
            raise UserError(f"{where}: `{alias}` and `{name}` are one key; give one of them")
    return {ALIASES.get(name, name): value for name, value in values.items()}


def key_rows() -> Iterator[tuple[str, str, str, str]]:
    """(name, alias, default, meaning) of every key, as text."""
    for name, default in config_to_dict(Config()).items():
        rule, doc, alias = KEYS[name].values()
        yield name, alias, shown(default), f"{doc}; {rule.expected}" if "one of" in rule.expected else doc


def key_table() -> str:
    """Every key as a row of a Markdown table."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, alias, default, meaning in key_rows():
        other = f" (alias `{alias}`)" if alias else ""
        shown_default = "-" if default in ("", "null", "[]") else f"`{default}`"
        rows.append(f"| `{name}`{other} | {shown_default} | {meaning} |")
    return "\n".join(rows)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), earlier: Mapping[str, Any] | None = None
) -> Config:
    """The `Config` of a YAML file (None: defaults, or the keys of an `earlier` run) with `key=value`
    overrides, later ones winning.

    The bundled demo's file is read when neither `path` nor a model is given, and only then.
    Prints a note for a key that is accepted but does nothing. Raises `UserError`.
    """
    changes = _checked_overrides(overrides)
    if path is None and earlier is None and "model_name_or_path" not in changes:
        path = DEMO_CONFIG
    values = canonical(earlier or {}, "report.json")
    values = (values if path is None else _checked_all(read_yaml(path), str(path))) | changes
    if not values.get("model_name_or_path"):
        where = path if path is not None else OVERRIDES
        raise UserError(f"{where}: no model; set `model_name_or_path` to a folder or a Hub id")
    for name, note in IGNORED.items():
        if values.get(name) is not None:
            log.warning(f"`{name}: {shown(values[name])}` is ignored: {note}")
    return Config(**values, source="" if path is None else str(path))


def check_keys(path: str | Path | None, overrides: Sequence[str]) -> None:
    """Raise `UserError`, as `load_config` does, for an unreadable file, unknown keys and bad values."""
    _checked_all(read_yaml(path) if path else {}, str(path))
    _checked_overrides(overrides)


def config_from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The `Config` of plain values. `where` names their origin in a `UserError`."""
    return Config(**_checked_all(values, where))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Every key in plain YAML / JSON types; `config_from_dict` gives an equal `Config` back."""
    values = {name: getattr(config, name) for name in KEYS}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
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
        wrong = f"`layer: {shown(config.layer)}` is out of range: {shown(outside)}"
        raise UserError(f"{wrong}; the model has {num_layers} layers, 0 to {num_layers - 1}")
    return tuple(sorted(layers))


def known_key(name: str) -> bool:
    """Whether `name` is a key or an alias of one."""
    return name in KEYS or name in ALIASES


def unknown_key(name: str, where: str) -> UserError:
    """The error that names the nearest known key."""
    found = difflib.get_close_matches(name, [*KEYS, *ALIASES, *_SYNONYMS], n=1, cutoff=0)[0]
    near = ALIASES.get(found, _SYNONYMS.get(found, found))
    return UserError(f"{where}: unknown key `{shown(name)}`; the nearest known key is `{near}`")


def _checked(name: str, value: Any, where: str) -> Any:
    expected, convert = KEYS[ALIASES.get(name, name)]["rule"]
    try:
        converted, valid = convert(value), True
    except (ValueError, TypeError, OverflowError, KeyError):
        converted, valid = None, False
    if not valid:
        raise UserError(f"{where}: `{name}: {shown(value)}` is not valid; it must be {expected}")
    return converted


def _checked_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    pairs = (_checked_all(dict([split_override(text)]), OVERRIDES) for text in overrides)
    return {name: value for pair in pairs for name, value in pair.items()}


def _checked_all(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in values:
        if not known_key(name):
            raise unknown_key(str(name), where)
    return canonical({name: _checked(name, value, where) for name, value in values.items()}, where)

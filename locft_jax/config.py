"""What a run is: a frozen `Config`, read from flat YAML and `key=value` overrides.
The names that the reference has for keys are valid too. Anything wrong is a `UserError` that names the place,
the key, the value and the remedy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from locft_jax import rules as r
from locft_jax.errors import UserError
from locft_jax.logs import log
from locft_jax.rules import read_yaml, shown, split_override

DEMO_FOLDER = r.DEMO_FOLDER
DEMO_CONFIG = DEMO_FOLDER / "demo.yaml"
OVERRIDES = "command line"  # how messages name the place of `key=value` arguments


def key(default: Any, rule: r.Rule, doc: str, alias: str = "") -> Any:
    """A key of `Config`: its default, what it may be, what it means, and another name that is valid too."""
    known = {"rule": rule, "doc": doc, "alias": alias}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), hash=False, metadata=known)
    return field(default=default, metadata=known)


@dataclass(frozen=True)
class Config:
    """One run. Values are converted and checked on construction, from Python too, where an alias may be given
    for a key; raises UserError. `demo:NAME` is a file of the bundled demo."""

    # fmt: off
    model_name_or_path: str = key("", r.MODEL, "folder or Hub id", "model")
    data_path: str | None = key(None, r.PATH_OR_NULL, "edits: a file or a Hub data set")
    num_edits: int | None = key(None, r.COUNT_OR_NULL, "the first n edits; null: all")
    output_dir: str | None = key(None, r.PATH_OR_NULL, "default --out; null: runs/NAME", "save_model_dir")
    layer: int | tuple[int, ...] | None = key(None, r.optional(r.several(r.whole(0), 1)),
        "layer or layers, from 0; null: relative depth 0.7")
    rewrite_module: str | tuple[str, ...] = key(
        "model.layers.{}.mlp.down_proj.weight", r.several(r.MODULE, 1),
        "what is tuned in them: whole path components; `model.layers.{}` is the entire layer")
    learning_rate: float = key(5e-4, r.POSITIVE, "of Adam", "lr")
    batch_size: int = key(100, r.whole(1), "edits a step")
    num_epochs: int = key(25, r.whole(1), "epochs at most", "num_steps")
    weight_decay: float = key(0.0, r.real(0), "L2 inside Adam, as in the reference")
    device: str | None = key(None, r.DEVICE, "accepted, ignored with a note")
    seed: int = key(0, r.whole(0, 2**32 - 1), "of the order of edits, of samples and texts")
    loss_average: str = key("example", r.choice("example", "token"), "what the mean loss of a batch is over")
    loss_floor: float = key(1e-2, r.real(0), "below it a batch makes no step and an epoch ends the run")
    pipeline: str = key("breadth", r.choice("breadth", "depth"),
        "`depth`: each mini-batch to convergence in turn, `num_epochs` steps at most")
    method: str = key("ft-m", r.choice("ft-m", "ft-l"), "`ft-l`: loss on the last target token only")
    norm_constraint: float | None = key(None, r.POSITIVE_OR_NULL, "most that an element may change")
    append_eos: bool = key(True, r.SWITCH, "the end of the answer is trained too")
    chat_template: bool = key(False, r.SWITCH, "prompts are put into the tokenizer's chat template")
    on_conflict: str = key("keep", r.choice("error", "last", "keep"), "of one prompt with several targets")
    weights: str = key("checkpoint", r.choice("checkpoint", "float32", "bfloat16", "int8"),
        "dtype of the frozen weights")
    mesh: Mapping[str, int] = key({"data": 1, "model": -1}, r.MESH, "layout of the devices")
    row_length: int = key(64, r.whole(1), "tokens a packed row (longer where an edit is longer)")
    activation_cache: str = key("auto", r.choice("auto", "device", "host", "disk", "off"),
        "where the activations that enter the site are kept", "prefix_cache")
    memory_budget: float | None = key(None, r.POSITIVE_OR_NULL, "GiB for caches; null: 80 % of what is free")
    evaluate: bool = key(True, r.SWITCH, "every probe is asked before and after")
    eval_sample: int | None = key(None, r.COUNT_OR_NULL, "probes of each kind; null: all")
    eval_every: int | None = key(None, r.COUNT_OR_NULL,
        "epochs (depth: mini-batches) between evaluations; null: never")
    capability_data: tuple[str, ...] = key((), r.several(r.PATH), "files of questions that no edit is about")
    checkpoint_every: str = key("10m", r.EVERY, "minutes (`10m`) or steps (`200`)")
    export: tuple[str, ...] = key(("hf", "delta", "orbax"), r.several(r.choice("hf", "delta", "orbax")),
        "what is written")
    report_to: tuple[str, ...] = key((), r.several(r.choice("tensorboard", "wandb")),
        "where the losses of steps are shown too")
    preserve: str = key("none", r.choice("none", "soft", "null", "kfac"),
        "updates avoid the inputs that other texts have")
    preserve_strength: float | None = key(None, r.POSITIVE_OR_NULL,
        "`soft`, `kfac`: > 0; `null`: a share of the trace, in (0, 1)")
    preserve_data: str | None = key(None, r.PATH_OR_NULL, "`model` (default), `templates`, or a file")
    preserve_tokens: str = key("all", r.choice("all", "last"),
        "`last`: of a retained text only what follows its last token is to stay")
    preserve_kl: float | None = key(None, r.optional(r.real(0)),
        "weight of the KL divergence from the base on the retained texts; 0: off")
    augment_prefixes: int = key(0, r.whole(0, 1000), "times that an edit is also trained after a random text")
    augment_data: str | None = key(None, r.PATH_OR_NULL, "file of such texts; null: the model writes them")
    augment_rephrases: int = key(0, r.whole(0), "given rephrases that are trained too, and then not asked")
    # fmt: on
    source: str = field(default="", repr=False, compare=False)  # the file read; not a key

    def __post_init__(self) -> None:
        for name in KEYS:
            object.__setattr__(self, name, _checked(name, getattr(self, name), "Config"))
        if self.eval_every is not None and not self.evaluate:
            raise UserError(f"Config: `eval_every: {self.eval_every}` needs evaluate: true")
        strength = self.preserve_strength
        if self.preserve == "null" and strength is not None and strength >= 1:
            wrong = f"Config: `preserve_strength: {shown(strength)}` is not valid; with preserve=null"
            raise UserError(f"{wrong} it must be a number > 0 and < 1")

    @property
    def name(self) -> str:
        """Name of the run: the config file's stem, else the model's last path component."""
        if self.source:
            return Path(self.source).stem
        model = Path(self.model_name_or_path)
        return (model if model.name not in ("", "..") else model.resolve()).name or "model"


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
    """The same values by the keys' names. Raises UserError for a key that is given by its alias too."""
    for alias, name in ALIASES.items():
        if alias in values and name in values:
            raise UserError(f"{where}: `{alias}` and `{name}` are one key; give one of them")
    return {ALIASES.get(name, name): value for name, value in values.items()}


def key_rows() -> Iterator[tuple[str, str, str, str]]:
    """(name, alias, default, meaning) of every key, as text."""
    for name, default in config_to_dict(Config()).items():
        rule, doc, alias = KEYS[name].values()
        yield name, alias, shown(default), f"{doc}; {rule.expected}" if "one of" in rule.expected else doc


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), earlier: Mapping[str, Any] | None = None
) -> Config:
    """The `Config` of a YAML file (None: defaults, or the keys of an `earlier` run) with `key=value`
    overrides, later ones winning. Only where neither `path` nor a model is given, it is the bundled demo's
    file. Raises UserError."""
    changes = _checked_overrides(overrides)
    if path is None and earlier is None and "model_name_or_path" not in changes:
        path = DEMO_CONFIG
    values = canonical(earlier or {}, "report.json")
    values = (values if path is None else _checked_all(read_yaml(path), str(path))) | changes
    if not values.get("model_name_or_path"):
        raise UserError(f"{path or OVERRIDES}: no model; set `model_name_or_path` to a folder or a Hub id")
    if values.get("device") is not None:
        note = "JAX uses every device it finds (JAX_PLATFORMS chooses the kind, `mesh` the layout)"
        log.warning(f"`device: {shown(values['device'])}` is ignored: {note}")
    return Config(**values, source=str(path or ""))


def check_keys(path: str | Path | None, overrides: Sequence[str]) -> None:
    """Raise UserError, as `load_config` does, for an unreadable file, unknown keys and bad values."""
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
    """Tuned layers, ascending; by default relative depth 0.7, as the paper (22 of 32). Raises UserError."""
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
        return convert(value)
    except (ValueError, TypeError, OverflowError, KeyError):
        wrong = f"{where}: `{name}: {shown(value)}` is not valid"
    raise UserError(f"{wrong}; it must be {expected}")


def _checked_all(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in values:
        if not known_key(name):
            raise unknown_key(str(name), where)
    return canonical({name: _checked(name, value, where) for name, value in values.items()}, where)


def _checked_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    pairs = (_checked_all(dict([split_override(text)]), OVERRIDES) for text in overrides)
    return {name: value for pair in pairs for name, value in pair.items()}

"""Text -> values: the strict reader of flat YAML and `key=value`, and the rules for what a key may be.

Anything wrong with the text is a `UserError` that names the place, the line and the column.
"""

import math
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from locft_jax.errors import UserError

DEMO_FOLDER = Path(__file__).parent / "demo"
_LONGEST = 2**16  # bytes; a larger file is not a config, and YAML would take long to say so


# ---------------------------------------------------------------- reading


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Keys and values of a file; {} of an empty one. Raises UserError if it is no flat YAML."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_LONGEST + 1)
        text = raw.decode()  # YAML skips a byte order mark itself
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a config: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        wrong = f"{path}: cannot read the config: {error.strerror}; give the path of a YAML file"
        raise UserError(wrong) from None
    if len(raw) > _LONGEST:
        raise UserError(f"{path}: too large for a config; is it a data file (`data_path`)?")
    values = _parse(text, str(path))
    if not isinstance(values, dict) and not is_null(values):
        raise UserError(f"{path}: a config must be lines of `key: value`, not {shown(values)}")
    return {} if is_null(values) else values


def split_override(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value). Raises UserError for anything else."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise UserError(f"{shown(text)}: expected key=value, for example learning_rate=5e-4")
    # Only lists, mappings and quotes are YAML: a path may hold `#`, `: ` or `&`.
    return key, _parse(value, key) if value[:1] in tuple("[{\"'") else value


def is_null(value: Any) -> bool:
    """Whether a value, as text or from Python, stands for nothing."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "~", "null"))


def shown(value: Any) -> str:
    """A value as a user would write it, short enough for a message."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, int) and value.bit_length() > 1000:
        return "(a very long number)"
    value = list(value) if isinstance(value, tuple) else value
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


class _Loader(yaml.BaseLoader):
    """YAML as lists and mappings of *text*, so that `5e-4` is a number and `off` is not `false`. A flat file
    needs no anchors, aliases, tags or depth: they are refused, and so are keys that appear twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, fail = self.peek_event(), yaml.composer.ComposerError
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            wrong = "anchors, aliases and tags (&, *, !) are not supported; quote such text"
            raise fail(None, None, wrong, event.start_mark)
        if self.depth > 4:
            raise fail(None, None, "nested too deeply; a config is flat", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key `{shown(key.value)}` appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML: chr(0xFFFFFFFF)
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if isinstance(error, yaml.reader.ReaderError):  # it knows only how far it came
            before = text[: error.position].split("\n")
            at = f"line {len(before)}, column {len(before[-1]) + 1}: "
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        if "[" in text and "{}" in text:
            problem = f"{problem} (inside [ ], put quotes around a name with {{}})"
        raise UserError(f"{where}: {at}malformed YAML: {problem}") from None


# ---------------------------------------------------------------- rules


class Rule(NamedTuple):
    """What values a key takes."""

    expected: str  # completes "it must be ..."
    convert: Callable[[Any], Any]  # text or Python value -> value; ValueError or TypeError if bad


def _valid(value: Any, valid: bool) -> Any:
    if not valid:
        raise ValueError
    return value


def _text(value: Any) -> str:
    value = os.fspath(value)
    _valid(value, isinstance(value, str) and bool(value.strip()) and min(value) >= " ")
    value.encode()  # a lone surrogate could not be written to a report
    return str(value)


def _path(value: Any) -> str:
    text = _text(value)
    inside = text.removeprefix("demo:")
    return os.path.expanduser(text) if inside == text else str(DEMO_FOLDER / inside)


def _module(value: Any) -> str:
    text, part = _text(value), r"([\w-]+|\{\})"
    return str(_valid(text, text.count("{}") <= 1 and bool(re.fullmatch(rf"{part}(\.{part})*", text))))


def _every(value: Any) -> str:
    text = str(operator.index(value)) if isinstance(value, int) else str(value).replace(" ", "")
    known = re.fullmatch(r"[0-9]{1,9}|[0-9]{1,6}(\.[0-9]{1,3})?m(in)?", text)
    _valid(text, bool(known) and float(text.rstrip("min")) > 0 and not isinstance(value, bool))
    return text.removesuffix("in")


def _mesh(value: Any) -> dict[str, int]:
    shape = {name: whole(-1).convert(value[name]) for name in ("data", "model")}
    sizes = list(shape.values())
    return dict(_valid(shape, len(value) == 2 and 0 not in sizes and sizes != [-1, -1]))


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    """A whole number in a range."""

    def convert(value: Any) -> Any:
        number = int(value) if isinstance(value, str) else operator.index(value)
        return _valid(number, not isinstance(value, bool) and low <= number <= high)

    return Rule(f"a whole number from {low} to {high}", convert)


def real(low: float, *, above: bool = False) -> Rule:
    """A finite number of at least `low`, or `above` it."""

    def convert(value: Any) -> Any:
        number = float(value)
        large = number > low if above else number >= low
        return _valid(number, large and math.isfinite(number) and not isinstance(value, bool))

    return Rule(f"a number {'>' if above else '>='} {low:g}", convert)


def choice(*names: str) -> Rule:
    """One of some names."""

    def convert(value: Any) -> Any:
        value = "off" if value is False else value  # how YAML 1.1 readers spell `off`
        return str(_valid(value, value in names))

    return Rule("one of " + ", ".join(names), convert)


def optional(rule: Rule) -> Rule:
    """`rule`, or null."""
    return Rule(rule.expected + ", or null", lambda v: None if is_null(v) else rule.convert(v))


def several(rule: Rule, least: int = 0) -> Rule:
    """One value by `rule` or more; with `least` 0 any number of them, as a tuple."""

    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return rule.convert(value) if least else () if is_null(value) else (rule.convert(value),)
        items = tuple(rule.convert(v) for v in value)
        return _valid(items, len(set(items)) == len(items) >= least)

    return Rule(f"{rule.expected}, or a list of such without duplicates{'' if least else ', or []'}", convert)


_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
PATH = Rule("a path or an id", _path)
SWITCH = Rule("true or false", lambda v: _SWITCHES[str(v).lower()])
MODEL = Rule("a folder or a Hub id", lambda v: "" if is_null(v) else _path(v))
DEVICE = optional(Rule("a device", lambda v: _text(str(v) if isinstance(v, int) else v)))
MODULE = Rule("a path of whole components with at most one {} for the layer, such as "
              "model.layers.{}.mlp.down_proj.weight", _module)  # fmt: skip
MESH = Rule("{data: n, model: m} with n and m >= 1, one of them -1 for all the rest", _mesh)
POSITIVE = real(0, above=True)
PATH_OR_NULL, COUNT_OR_NULL, POSITIVE_OR_NULL = map(optional, (PATH, whole(1), POSITIVE))
EVERY = Rule("minutes such as 10m, or a number of steps", _every)

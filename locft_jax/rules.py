"""What values a key of the config may take: rules that turn text or a Python value into the key's type."""

import math
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from locft_jax.flat_yaml import is_null

DEMO_FOLDER = Path(__file__).parent / "demo"


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
    shape = {name: whole(-1).convert(value[name]) for name in ("data", "model")}
    if len(value) > 2 or 0 in shape.values() or list(shape.values()) == [-1, -1]:
        raise ValueError
    return shape


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    """A whole number in a range."""

    def convert(value: Any) -> int:
        number = int(value) if isinstance(value, str) else operator.index(value)
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError
        return number

    return Rule(f"a whole number from {low} to {high}", convert)


def real(low: float, *, above: bool = False) -> Rule:
    """A finite number of at least `low`, or `above` it."""

    def convert(value: Any) -> float:
        number = float(value)
        small = number <= low if above else number < low
        if isinstance(value, bool) or not math.isfinite(number) or small:
            raise ValueError
        return number

    return Rule(f"a number {'>' if above else '>='} {low:g}", convert)


def choice(*names: str) -> Rule:
    """One of some names."""

    def convert(value: Any) -> str:
        value = "off" if value is False else value  # how YAML 1.1 readers spell `off`
        if value not in names:
            raise ValueError
        return str(value)

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
        if len(set(items)) != len(items) or len(items) < least:
            raise ValueError
        return items

    return Rule(f"{rule.expected}, or a list of such without duplicates{'' if least else ', or []'}", convert)


PATH = Rule("a path or an id", _path)
SWITCH = Rule("true or false", lambda v: _SWITCHES[str(v).lower()])
MODEL = Rule("a folder or a Hub id", lambda v: "" if is_null(v) else _path(v))
DEVICE = optional(Rule("a device", lambda v: _text(str(v) if isinstance(v, int) else v)))
MODULE = Rule("a path of whole components with at most one {} for the layer, such as "
              "model.layers.{}.mlp.down_proj.weight", _module)  # fmt: skip
MESH = Rule("{data: n, model: m} with n and m >= 1, one of them -1 for all the rest", _mesh)
PATH_OR_NULL, COUNT_OR_NULL = optional(PATH), optional(whole(1))
POSITIVE = real(0, above=True)
POSITIVE_OR_NULL = optional(POSITIVE)
EVERY = Rule("minutes such as 10m, or a number of steps", _every)

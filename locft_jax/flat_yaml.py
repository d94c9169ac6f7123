"""Strict reading of flat YAML files and `key=value` overrides, as text that the keys' rules convert.

Anything wrong is a `UserError` that names the place, the line and the column.
"""

from pathlib import Path
from typing import Any

import yaml

from locft_jax.errors import UserError

_LONGEST = 2**16  # bytes; a larger file is not a config, and YAML would take long to say so
_NULLS = ("", "~", "null")


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
    if is_null(values):
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config must be lines of `key: value`, not {shown(values)}")
    return values


def split_override(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value). Raises UserError for anything else."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise UserError(f"{shown(text)}: expected key=value, for example learning_rate=5e-4")
    # Only lists, mappings and quotes are YAML: a path may hold `#`, `: ` or `&`.
    return key, _parse(value, key) if value[:1] in tuple("[{\"'") else value


def is_null(value: Any) -> bool:
    """Whether a value, as text or from Python, stands for nothing."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NULLS)


def shown(value: Any) -> str:
    """A value as a user would write it, short enough for a message."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, int) and value.bit_length() > 1000:
        return "(a very long number)"
    if isinstance(value, tuple):
        value = list(value)
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


class _Loader(yaml.SafeLoader):
    """YAML as nested lists and mappings of *text*: a key's rule converts, not YAML's guesses.

    So `5e-4` is a number, `off` is not `false`, and a model folder may be called 123. A flat file
    needs no anchors, aliases, tags or depth: they are refused, and so are keys that appear twice.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (never written to)
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
        position = getattr(error, "position", None)
        if position is not None:
            before = text[:position]
            at = f"line {before.count(chr(10)) + 1}, column {len(before.split(chr(10))[-1]) + 1}: "
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        if "[" in text and "{}" in text:
            problem = f"{problem} (inside [ ], put quotes around a name with {{}})"
        raise UserError(f"{where}: {at}malformed YAML: {problem}") from None

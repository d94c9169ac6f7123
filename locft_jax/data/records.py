"""Raw records from any file (.json, .jsonl, .csv, each also .gz) or Hub set, and their values. What cannot be
used is an error that names the file, the line or record (from 1), the field, and what would be right."""

import csv
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

from locft_jax.errors import UserError, cause
from locft_jax.io.remote import is_url, open_file

# A record's prompt, in order of preference; the first one that is present and not null counts.
PROMPT = ("prompt", "src", "update", "question", "text")
ALIAS = ("str", "value", "text")  # an answer that is an object has its text under one of these

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
KINDS |= dict.fromkeys((int, float), "a number")


class Record(NamedTuple):
    """A record as it was read (any JSON value), and its place."""

    where: str  # how messages name it: "edits.jsonl: line 7"
    value: Any


def open_records(source: str) -> tuple[str, Iterator[Record]]:
    """(sha256, the records one by one) of a file, here or at a URL, or a Hub set (`owner/name[:split]`). The
    hash is of the file's bytes, or `digest` of a Hub set. Raises UserError, also while iterating."""
    readers = {".json": _json_records, ".jsonl": _jsonl_records, ".csv": _csv_records}
    kind, hub = os.path.splitext(source.lower().removesuffix(".gz"))[1], HUB_ID.fullmatch(source)
    if is_url(source) or os.path.isfile(source):
        if kind not in readers:
            kinds = ", ".join(readers)
            raise UserError(f"{source}: unknown kind of file; the name must end in {kinds}, or + .gz")
        try:
            with open_file(source) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror or error}") from None
        return sha256, _file_records(source, readers[kind])
    if os.path.isdir(source):
        raise UserError(f"{source} is a folder; name the data file in it")
    if not hub or kind in readers:
        raise UserError(f"{source}: no such file, and not a Hub data set's id (owner/name)")
    return _hub_records(source, hub[1], hub[2])


def _file_records(path: str, reader: Any) -> Iterator[Record]:
    try:
        with open_file(path) as raw:
            yield from reader(gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw, path)
    except EOFError:
        raise UserError(f"{path}: the gzip file is truncated; fetch or make it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a valid gzip file ({error}); make it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_records(file: IO[bytes], path: str) -> Iterator[Record]:
    """A list of records, an object that holds one such list, or a single record."""
    text = _decode(file.read(), path)
    if absent(text):
        raise UserError(f"{path} is empty; it must hold a list of records")
    value = _parse_json(text, path)
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        texts = any(isinstance(value.get(n), str) for n in (*PROMPT, "instruction"))
        if texts or "requested_rewrite" in value:
            lists = [[value]]
        if len(lists) != 1:
            right = "it must be a list of records, or an object with exactly one list"
            raise UserError(f"{path}: the top level is an object with {len(lists)} lists; {right}")
        value = lists[0]
    if not isinstance(value, list):
        wrong_type(path, "the top level", value, "a list of records")
    for number, record in enumerate(value, 1):
        yield Record(f"{path}: record {number}", record)


def _jsonl_records(file: IO[bytes], path: str) -> Iterator[Record]:
    """One JSON object a line; blank lines are skipped."""
    for number, raw in enumerate(file, 1):
        where = f"{path}: line {number}"
        if text := _decode(raw, where).rstrip():  # else an error at its end would be on the next line
            yield Record(where, _parse_json(text, where, "each line must be one JSON object"))


def _csv_records(file: IO[bytes], path: str) -> Iterator[Record]:
    """Comma-separated rows below a header line; a record's line is the one it ends on."""
    lines = (_decode(raw, f"{path}: line {number}") for number, raw in enumerate(file, 1))
    rows = csv.reader(lines, strict=True)  # strict: an open quote must not swallow the file
    header: list[str] = []
    try:
        for row in filter(None, rows):
            where = f"{path}: line {rows.line_num}"
            if not header:
                header = [name.strip() for name in row]
                if not {*header} & {*PROMPT, "instruction"} or len({*header}) < len(header):
                    right = "the first line must name the columns, each once, such as prompt,target_new"
                    raise UserError(f"{where}: the header is {show(','.join(header))}; {right}")
            elif len(row) > len(header):
                remedy = "put cells that hold a comma in double quotes"
                raise UserError(f"{where}: {len(row)} cells, but the header has {len(header)}; {remedy}")
            else:
                yield Record(where, dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: not valid CSV: {error}") from None


def _hub_records(source: str, name: str, split: str | None) -> tuple[str, Iterator[Record]]:
    try:
        from datasets import load_dataset  # slow to import, and only needed here

        data = load_dataset(name, split=split)
        if split is None:
            data = data["train"] if "train" in data else data[next(iter(data))]
        records = list(data)
        sha256 = digest(records)
    except Exception as error:  # whatever the network, the Hub or its formats come up with
        wrong = "no such file here, and could not be loaded from the Hub either"
        raise UserError(f"{source}: {wrong} ({cause(error, 500)})") from None
    return sha256, (Record(f"{source}: record {n}", record) for n, record in enumerate(records, 1))


def digest(records: Iterable[Any]) -> str:
    """sha256 of records as canonical JSON, one a line."""
    sha256 = hashlib.sha256()
    for record in records:
        sha256.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    return sha256.hexdigest()


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A Python record with JSON's types: dicts and lists. Raises UserError for what JSON could not hold."""
    if depth > 50:
        raise UserError(f"{where}: nested too deeply; a record is flat, or nearly so")
    if isinstance(value, int) and value.bit_length() > 10_000:
        raise UserError(f"{where}: not usable: a number with too many digits")
    if isinstance(value, Mapping):
        return {str(k): plain(v, where, depth + 1) for k, v in value.items()}
    return [plain(v, where, depth + 1) for v in value] if isinstance(value, list | tuple) else value


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text (byte {e.start}); save the file as UTF-8") from None


def _parse_json(text: str, where: str, right: str = "") -> Any:
    hint = f"; {right}" if right else ""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not right and error.msg == "Extra data":
            hint = "; a file with one object a line must be called .jsonl"
        at = f"{'' if right else f': line {error.lineno}'}, column {error.colno}"
        raise UserError(f"{where}{at}: not valid JSON: {error.msg}{hint}") from None
    except (RecursionError, ValueError) as error:  # Python refuses integers of thousands of digits
        wrong = "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
        raise UserError(f"{where}: not usable JSON: {wrong}{hint}") from None


def absent(value: Any) -> bool:
    """Null, blank, empty, or the NaN that table libraries write for a missing cell."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any, where: str, field: str, numbers: bool = True) -> str:
    """`value` as text that is not blank and can be encoded; a number (if allowed) as written."""
    if numbers and type(value) in (int, float) and (type(value) is int or math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        wrong_type(where, repr(field), value, "text or a finite number" if numbers else "text")
    if absent(value):
        raise UserError(f"{where}: {field!r} is empty; it must hold text")
    try:
        value.encode()
    except UnicodeEncodeError:
        wrong = f"{where}: {field!r} holds half a surrogate pair ({show(value)})"
        raise UserError(f"{wrong}; it must be text that UTF-8 can encode") from None
    return value


def as_strings(value: Any, where: str, field: str) -> list[str]:
    """A string, or a list of strings; null and blank ones are left out."""
    values = value if isinstance(value, list) else [value]
    return [as_text(v, where, field, numbers=False) for v in values if not absent(v)]


def alias(value: Any, where: str, field: str) -> str | None:
    """An answer, or the first of its aliases, however deep they are nested; None if absent."""
    while value and isinstance(value, list | dict):
        key: Any = 0 if isinstance(value, list) else next((k for k in ALIAS if k in value), None)
        if key is None:
            break
        value = value[key]
    return None if absent(value) else as_text(value, where, field)


def required(fields: dict[str, Any], names: Sequence[str], what: str, where: str) -> tuple[str, Any]:
    """(name, value) of the first of these fields that is there. Raises UserError where none is."""
    for name in names:
        if fields.get(name) is not None:
            return name, fields[name]
    found = ", ".join(show(n) for n in list(fields)[:12]) or "none"
    raise UserError(f"{where}: no {what}: the fields are {found}; it must be called {' or '.join(names)}")


def optional(fields: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    """The text of the first of these fields that is there."""
    name = next((n for n in names if fields.get(n) is not None), "")
    return alias(fields.get(name), where, name)


def show(value: Any) -> str:
    """A short, printable form of something from the user's file, for messages."""
    return repr(value[:60] + "..." if isinstance(value, str) and len(value) > 60 else value)


def wrong_type(where: str, what: str, value: Any, right: str) -> NoReturn:
    """Raise the UserError for a value of another type."""
    kind = KINDS.get(type(value), type(value).__name__)
    raise UserError(f"{where}: {what} is {kind}; it must be {right}")

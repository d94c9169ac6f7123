"""Edit requests from a file, a Hub set, or records in memory.

A record's layout is detected from its fields: the tables below list the spellings in use, and small functions
read what is nested. Unknown fields are ignored."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from locft_jax.config import Config
from locft_jax.data import records as rec
from locft_jax.data.records import PROMPT, Record, absent, as_strings, as_text, optional, required
from locft_jax.errors import UserError

Probe = tuple[str, str | None]  # a prompt and its known answer, None where nobody wrote one down

# Spellings in order of preference; the first one that is present and not null counts (PROMPT: records.py).
TARGET = ("target_new", "alt", "target", "ans", "labels", "answer")
SUBJECT = ("subject", "concept")
CASE = ("case_id", "id")
GROUND_TRUTH = ("ground_truth", "target_true", "answers")
# Probes add up over all spellings that are present.
REPHRASE = ("rephrase_prompt", "rephrase_prompts", "rephrase", "rephrases", "paraphrase_prompts")
LOCALITY = (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans"))
LOCALITY_NESTED = ("locality", "locality_probes")
PORTABILITY = (("portability_prompt", "portability_ground_truth"),
               ("mhop", "mhop_ans"),  # WikiBigEdit's multi-hop question
               ("questions", "new_answer"))  # MQuAKE's multi-hop questions, one answer for all of them
PORTABILITY_NESTED = ("portability", "portability_probes")
PROBE_PROMPT = ("prompt", "question", "loc", "New Question")
PROBE_ANSWER = ("ground_truth", "answer", "loc_ans", "New Answer")


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One edit: after it, the model should continue `prompt` with `target_new`."""

    case: str  # the file's own id, else the record's index from 0
    prompt: str
    target_new: str
    subject: str | None = None
    ground_truth: str | None = None  # the answer before the edit, where the data knows it
    rephrases: tuple[str, ...] = ()  # generalization probes: prompts that target_new answers too
    locality: tuple[Probe, ...] = ()  # the answers to these should not change
    portability: tuple[Probe, ...] = ()  # what follows from the edit
    batch: int = 0  # the how-manieth arrival it came with (data/streaming.py)


@dataclass(frozen=True)
class EditData:
    """What `read_requests` found."""

    requests: list[EditRequest]
    duplicates: int  # records with the same prompt and target as an earlier one: dropped
    conflicts: dict[str, list[str]]  # prompts with several targets, and these in order
    source: str
    sha256: str  # of the file's bytes, or of a Hub set's records as canonical JSON


def read_requests(path_or_id: str, num_edits: int | None = None, on_conflict: str = "keep") -> EditData:
    """Read edits from a file, or from a Hub data set (`owner/name` or `owner/name:split`).

    Layouts: ZsRE (MEND), CounterFact (flat, ROME's), WikiBigEdit, QAEdit, KnowEdit / EasyEdit, MQuAKE (each
    rewrite is a request; the multi-hop questions go with a case's last one), and any records with a prompt
    and a target. Prompts and targets are compared without the white space around them, and kept as they are.

    `num_edits` takes the first so many requests that remain after duplicates were dropped; nothing beyond
    them is parsed. `on_conflict`, for prompts with several targets: "keep" all, keep the "last" target only,
    or "error". Raises UserError for input that cannot be used.
    """
    config, source = Config(num_edits=num_edits, on_conflict=on_conflict), os.fspath(path_or_id)
    sha256, records = rec.open_records(source)
    return _edit_data(records, config, source, sha256)


def requests_from_records(
    records: Iterable[Mapping[str, Any] | EditRequest],
    num_edits: int | None = None, on_conflict: str = "keep",
) -> EditData:  # fmt: skip
    """`read_requests` for records in memory: the same layouts and rules. An `EditRequest` is taken as it is;
    `sha256` is of all records as canonical JSON. Raises UserError, which names `record N`, from 1."""
    config = Config(num_edits=num_edits, on_conflict=on_conflict)
    if isinstance(records, Mapping | str):
        rec.wrong_type("records", "the argument", records, "a list of records")
    items = [Record(where := f"record {n}", rec.plain(record, where)) for n, record in enumerate(records, 1)]
    sha256 = rec.digest(asdict(v) if isinstance(v, EditRequest) else v for _, v in items)
    return _edit_data(items, config, "records", sha256)


def _edit_data(records: Iterable[Record], config: Config, source: str, sha256: str) -> EditData:
    parsed = (r for i, record in enumerate(records) for r in _requests(record, i))
    requests, duplicates, conflicts = _collect(parsed, config.num_edits, config.on_conflict == "last")
    if not requests:
        raise UserError(f"{source}: no records; an edit needs a prompt and a target_new")
    if conflicts and config.on_conflict == "error":
        few = lambda items, n: [*items[:n], *["..."] * (len(items) > n)]  # noqa: E731
        lines = [f"{rec.show(p)} -> {', '.join(few([*map(rec.show, t)], 3))}" for p, t in conflicts.items()]
        wrong = f"{source}: prompts with several targets, which cannot all be met ({len(conflicts)})"
        remedy = "leave one of each, or set on_conflict to keep or last"
        raise UserError(f"{wrong}: {'; '.join(few(lines, 5))}; {remedy}")
    return EditData(requests, duplicates, conflicts, source, sha256)


def _collect(
    parsed: Iterable[EditRequest], limit: int | None, keep_last: bool
) -> tuple[list[EditRequest], int, dict[str, list[str]]]:
    """Drop exact duplicates and find conflicts: (requests, duplicates, {prompt: its targets})."""
    requests: list[EditRequest] = []
    conflicts: dict[str, list[str]] = {}
    index: dict[str, int] = {}  # prompt -> its first request
    seen: set[tuple[str, str]] = set()
    duplicates = 0
    for request in parsed:
        prompt, target = request.prompt.strip(), request.target_new.strip()
        duplicate = (prompt, target) in seen
        duplicates += duplicate
        if prompt not in index:
            index[prompt] = len(requests)
            requests.append(request)
        else:
            rival = requests[index[prompt]].target_new.strip()
            if not duplicate:
                conflicts.setdefault(prompt, [rival]).append(target)
            if keep_last and rival != target:  # also where an older target is said once more
                requests[index[prompt]] = request
            elif not duplicate:
                requests.append(request)
        seen.add((prompt, target))
        if len(requests) == limit:
            break
    return requests, duplicates, conflicts


def _requests(record: Record, index: int) -> list[EditRequest]:
    """The requests of one record: one, or one a rewrite of a multi-hop case."""
    where, value = record
    if isinstance(value, EditRequest):
        for field in ("prompt", "target_new"):
            as_text(getattr(value, field), where, field, numbers=False)
        return [value]
    if not isinstance(value, dict):
        rec.wrong_type(where, "the record", value, 'an object like {"prompt": ..., "target_new": ...}')
    case, flat = optional(value, CASE, where) or str(index), _flatten(value, where)
    return [_request(f"{case}-{k}" if len(flat) > 1 else case, f, where) for k, f in enumerate(flat)]


def _request(case: str, fields: dict[str, Any], where: str) -> EditRequest:
    name, prompt = required(fields, PROMPT, "prompt", where)
    prompt = as_text(prompt, where, name, numbers=False)
    name, target = required(fields, TARGET, "target", where)
    target = as_text(target, where, name)
    truth = optional(fields, GROUND_TRUTH, where)
    rephrases = [p for n in REPHRASE if n in fields for p in as_strings(fields[n], where, n)]
    locality = _probes(fields, LOCALITY, LOCALITY_NESTED, where)
    portability = _probes(fields, PORTABILITY, PORTABILITY_NESTED, where)
    # Other subjects with the same true answer; WikiBigEdit: the same question in somebody else's voice.
    for name, probes, known in (("neighborhood_prompts", locality, truth), ("personas", portability, target)):
        probes += [(p, known) for p in as_strings(fields.get(name), where, name)]
    subject, rephrases = optional(fields, SUBJECT, where), list(dict.fromkeys(rephrases))
    return EditRequest(
        case, prompt, target, subject, truth, tuple(rephrases), tuple(locality), tuple(portability)
    )


def _flatten(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """`requested_rewrite` (an object in CounterFact, a list in MQuAKE) or the record as flat records."""
    rewrites = record.get("requested_rewrite")
    if rewrites is None:
        return [_fill(record, where)] if isinstance(record.get("target_new"), dict) else [record]
    if rewrites == []:
        raise UserError(f"{where}: 'requested_rewrite' is empty; it must hold at least one rewrite")
    flat = [_fill(r, where) for r in (rewrites if isinstance(rewrites, list) else [rewrites])]
    for fields in flat:
        if fields.get("prompt") is not None and "question" in fields:
            fields["rephrases"] = fields.pop("question")  # MQuAKE: the same fact, asked for
    # A case's probes hold once all of its rewrites are made, so they go with the last one.
    own = {"requested_rewrite", *PROMPT, *TARGET}
    flat[-1] = {k: v for k, v in record.items() if k not in own} | flat[-1]
    return flat


def _fill(rewrite: Any, where: str) -> dict[str, Any]:
    """A rewrite with its subject in the prompt's {} and its target as text."""
    if not isinstance(rewrite, dict):
        rec.wrong_type(where, "'requested_rewrite'", rewrite, "an object or a list of objects")
    prompt, target = rewrite.get("prompt"), rewrite.get("target_new")
    if isinstance(prompt, str) and "{}" in prompt:
        if rewrite.get("subject") is None:
            raise UserError(f"{where}: the prompt has a {{}} but no 'subject' to stand there")
        prompt = prompt.replace("{}", as_text(rewrite["subject"], where, "subject"))
    target = target.get("str", target) if isinstance(target, dict) else target
    return {**rewrite, "prompt": prompt, "target_new": target}


def _probes(
    fields: dict[str, Any], flat: Sequence[tuple[str, str]], nested: Sequence[str], where: str
) -> list[Probe]:
    probes = [p for names in flat if names[0] in fields for p in _pairs(fields, names, where)]
    return probes + [p for n in nested if n in fields for p in _nested(fields[n], where, n)]


def _pairs(fields: dict[str, Any], names: tuple[str, str], where: str) -> list[Probe]:
    """A field with one prompt or a list of them, and a field with their answers."""
    prompts, answers = fields.get(names[0]), fields.get(names[1])
    if absent(prompts):
        return []
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, list):
        answers = [answers] * len(prompts)  # one answer for all prompts
    elif len(prompts) == 1 != len(answers):
        answers = [answers]  # several names of one answer
    elif len(answers) != len(prompts):
        counts = f"{names[0]!r} has {len(prompts)} prompts and {names[1]!r} has {len(answers)} answers"
        raise UserError(f"{where}: {counts}; there must be one for each")
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if not absent(p)]
    return [(as_text(p, where, names[0], numbers=False), rec.alias(a, where, names[1])) for p, a in pairs]


def _nested(value: Any, where: str, field: str, depth: int = 0) -> list[Probe]:
    """KnowEdit's probes: objects with a prompt and an answer, or lists or named groups of these."""
    if absent(value):
        return []
    if depth > 4:
        raise UserError(f"{where}: {field!r} is nested too deeply; it must hold prompts and answers")
    if isinstance(value, str) and depth < 2:
        return [(as_text(value, where, field), None)]
    if isinstance(value, list):
        return [p for v in value for p in _nested(v, where, field, depth + 1)]
    if not isinstance(value, dict):
        rec.wrong_type(where, repr(field), value, "a list of objects with 'prompt' and 'ground_truth'")
    prompt = next((n for n in PROBE_PROMPT if n in value), None)
    if prompt is None:
        # Strings directly below a group's name could be anything: two levels make them an error.
        return [p for v in value.values() for p in _nested(v, where, field, depth + 2)]
    answer = next((n for n in PROBE_ANSWER if n in value), PROBE_ANSWER[0])
    return _pairs(value, (prompt, answer), f"{where}, in {field!r}")

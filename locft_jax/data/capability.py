"""Capability items: questions that have nothing to do with the edits, to see what an edit damages."""

import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locft_jax.data.records import Record, absent, as_text, open_records, optional, required, show, wrong_type
from locft_jax.errors import UserError

ANSWER_FORMAT = re.compile(r"Answer format:[ \t]*(\S.*?)\s*\Z")


@dataclass(frozen=True, slots=True)
class CapabilityItem:
    """A question about something else, scored by likelihood where it has `choices`, else by generation."""

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


def read_capability(paths: str | Sequence[str]) -> list[CapabilityItem]:
    """Read questions that have nothing to do with the edits, from one or several files or Hub sets.

    Records: prompt (or question) and answer; instruction, input and answer (the choices are those of its
    "Answer format: a/b/c"); or question, choices (a list, or lists of text and label) and answer as an index
    from 0, a letter or label, or text. `task` is the record's, else the file's name, else for
    train/validation/test files the folder's name. Raises UserError for input that cannot be used.
    """
    items: list[CapabilityItem] = []
    for source in map(os.fspath, [paths] if isinstance(paths, str | os.PathLike) else paths):
        task = _task_name(source)
        found = [_capability_item(record, task) for record in open_records(source)[1]]
        if not found:
            raise UserError(f"{source}: no records; an item needs a prompt and an answer")
        items += found
    return items


def _task_name(source: str) -> str:
    name = re.sub(r"(\.(jsonl?|csv))?(\.gz)?$|:[^:]*$", "", os.path.basename(source))
    folder = Path(source).absolute().parent.name
    return folder or name if name in ("train", "validation", "valid", "dev", "test") else name


def _capability_item(record: Record, task: str) -> CapabilityItem:
    where, fields = record
    if not isinstance(fields, dict):
        wrong_type(where, "the record", fields, 'an object like {"prompt": ..., "answer": ...}')
    task = optional(fields, ("task",), where) or task
    if not absent(fields.get("choices")):
        return _choice_item(fields, task, where)
    name, prompt = required(fields, ("instruction", "prompt", "question"), "prompt", where)
    prompt = as_text(prompt, where, name, numbers=False)
    choices: tuple[str, ...] = ()
    answer = as_text(required(fields, ("answer",), "answer", where)[1], where, "answer")
    if name == "instruction":
        if (listed := ANSWER_FORMAT.search(prompt)) and "/" in listed[1]:
            choices = tuple(c.strip() for c in listed[1].split("/"))
        if not absent(fields.get("input")):
            prompt += "\n" + as_text(fields["input"], where, "input")
        if not choices:  # GSM8K's gold numbers come as 576.0, which no model writes
            answer = re.sub(r"\A(-?\d+)\.0+\Z", r"\1", answer)
        elif answer not in choices:
            right = f"it must be one of {show('/'.join(choices))}"
            raise UserError(f"{where}: 'answer' is {show(answer)}; {right}")
    return CapabilityItem(task, prompt, answer, choices)


def _choice_item(fields: dict[str, Any], task: str, where: str) -> CapabilityItem:
    """question + choices + answer; the answer is an index from 0, a label or letter, or text."""
    name, prompt = required(fields, ("question", "prompt"), "question", where)
    prompt = as_text(prompt, where, name, numbers=False)
    given = fields["choices"]
    texts, labels = (given.get("text"), given.get("label")) if isinstance(given, dict) else (given, None)
    if not isinstance(texts, list) or len(texts) < 2:
        raise UserError(f"{where}: 'choices' must list at least two texts, or hold 'text' and 'label'")
    choices = [as_text(t, where, "choices") for t in texts]
    key, answer = required(fields, ("answerKey", "answer"), "answer", where)
    right = f"an index from 0, a letter, or one of the {len(choices)} choices"
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        wrong_type(where, repr(key), answer, right)
    said = str(answer)
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != len(choices):
            raise UserError(f"{where}: 'choices' must have one label for each text")
        names = [[*map(str, labels)], choices]
    else:
        letters = [*string.ascii_uppercase[: len(choices)]]
        # A bare number among choices that are text is an index, not one of them.
        texts = choices if isinstance(answer, str) or answer in texts else []
        names = [letters, texts] if key == "answerKey" else [texts, letters]
    at = next((n.index(said) for n in names if said in n), -1)
    if at < 0 and re.fullmatch("[0-9]{1,3}", said):
        at = int(said)
    if not 0 <= at < len(choices):
        raise UserError(f"{where}: {key!r} is {show(said)}; it must be {right}")
    return CapabilityItem(task, prompt, choices[at], tuple(choices))

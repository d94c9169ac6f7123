"""Retained texts: a file's, the edits' templates with made-up subjects, or what the model itself writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.config import Config
from locft_jax.data.records import open_records
from locft_jax.data.requests import EditRequest
from locft_jax.data.tokenize import as_encoder, prompt_ids
from locft_jax.errors import UserError
from locft_jax.io.remote import open_file
from locft_jax.model.decode import sample
from locft_jax.model.model import Model
from locft_jax.model.spec import ModelSpec
from locft_jax.rules import shown

SAMPLES, SAMPLE_LENGTH = 512, 32  # sequences of so many tokens at most


def preserves(config: Config) -> bool:
    """Whether anything of other texts is to be retained."""
    return config.preserve != "none" or bool(config.preserve_kl)


def source_of(config: Config) -> str:
    """Where the retained inputs come from: `model` (also the default), `templates`, or a file."""
    return config.preserve_data or "model"


def window(config: Config, most: int) -> slice:
    """Which `most` tokens of a longer text count: its last ones where it is a prompt, else its first."""
    return slice(-most, None) if config.preserve_tokens == "last" else slice(most)


def unused(config: Config) -> list[str]:
    """Notes on the keys that say how to preserve where nothing preserves by them."""
    uses = {"preserve_strength": config.preserve != "none"}
    uses |= dict.fromkeys(("preserve_data", "preserve_tokens"), preserves(config))
    return [
        f"`{key}: {shown(value)}` is ignored: preserve is none"
        for key, used in uses.items()
        if not used and (value := getattr(config, key)) not in (None, "all")
    ]


def read_lines(key: str, source: str) -> list[str]:
    """The stripped lines of the text file that a config key names. Raises UserError."""
    try:
        with open_file(source) as file:
            return [line.strip() for line in file.read().decode().splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"{key}: {source} cannot be read as UTF-8 text ({e})") from None


def _text(where: str, record: Any) -> str:
    text = record.get("text", record.get("prompt")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"preserve_data: {where}: no `text` and no `prompt`")
    return text.strip()


def retained_texts(config: Config, requests: Sequence[EditRequest]) -> list[str] | None:
    """Retained texts; None where preserve is off, or the source is the model itself. Files: `.txt`, a text a
    line; else records (also of a Hub set) with `text` or `prompt`. Raises UserError for a file that holds
    none, for templates without subjects, and for the model's own texts where they are to be prompts."""
    source = source_of(config)
    if not preserves(config) or source == "model":
        if preserves(config) and config.preserve_tokens == "last":
            what = "preserve_tokens: last is for prompts, and the texts are the model's own"
            raise UserError(f"{what}; set preserve_data to prompts or templates, or use preserve_tokens=all")
        return None
    if source == "templates":
        return template_texts(requests, config.seed)
    if source.endswith(".txt"):
        texts = list(filter(None, read_lines("preserve_data", source)))
    else:
        texts = list(filter(None, (_text(*found) for found in open_records(source)[1])))
    if not texts:
        raise UserError(f"preserve_data: {source} holds no text")
    return texts


def template_texts(requests: Sequence[EditRequest], seed: int, each: int = 4) -> list[str]:
    """The edit prompts with made-up subjects, `each` a prompt: a word is the first half of one subject's word
    and the second half of another's, and in none of the requests (prompts, targets or probes), so that no
    retained fact is shown. Raises UserError when no request has a subject that is in its prompt."""
    usable = [(r.prompt, r.subject) for r in requests if r.subject and r.subject in r.prompt]
    if not usable:
        raise UserError("preserve_data: templates needs edits whose `subject` is in their `prompt`")
    words = sorted({w for _, subject in usable for w in subject.split() if len(w) > 1})
    known = set(" ".join(map(str, requests)).replace("'", " ").replace(",", " ").split())
    rng = np.random.default_rng([seed, len(usable)])

    def made_up(word: str) -> str:
        for _ in range(50):
            a, b = (words[i] for i in rng.integers(0, len(words), 2))
            new = a[: (len(a) + 1) // 2] + b[len(b) // 2 :]
            if new not in known:
                return new
        return word[:1] + word[:0:-1]  # so few subjects that halves make no new word: backwards

    return [
        prompt.replace(subject, " ".join(map(made_up, subject.split())))
        for prompt, subject in usable for _ in range(each)
    ]  # fmt: skip


def sample_model(
    model: Model, seed: int, count: int = SAMPLES, length: int = SAMPLE_LENGTH
) -> list[list[int]]:
    """`count` token sequences from the model itself: seeded, temperature 1, from BOS (where the tokenizer
    has one, else EOS) to the first EOS or `length` tokens. Raises UserError without BOS and EOS."""
    stop = np.isin(np.arange(model.spec.vocab_size), list(model.eos))
    shape = count, min(length, model.spec.max_position)
    return sample(model.params, model.mesh, first_token(model.tokenizer), stop, seed, shape)


def first_token(tokenizer: Any) -> int:
    """What a sampled text begins with. Raises UserError where the tokenizer has neither BOS nor EOS."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError("preserve_data: model needs a tokenizer with BOS or EOS; give a file of texts")
    return int(start)


def encode_retained(
    tokenizer: Any, spec: ModelSpec, config: Config, texts: Sequence[str] | None
) -> list[list[int]] | None:
    """Token ids of the retained texts with two tokens or more: [] when nothing is retained, None where the
    model itself is to write them. `texts` as from `retained_texts`. Raises UserError where none is left or
    the model lacks a token of theirs, or where the model cannot write any."""
    encoder = as_encoder(tokenizer)
    if not preserves(config):
        return []
    if texts is None:
        first_token(encoder.tokenizer)
        return None
    found = prompt_ids(encoder, texts, config.chat_template)
    ids, source = [i[window(config, spec.max_position)] for i in found if len(i) > 1], source_of(config)
    if not ids:
        raise UserError(f"preserve_data: {source} holds no text of two tokens or more")
    if max(map(max, ids)) >= spec.vocab_size:
        what = f"{source} has tokens beyond the vocabulary of {spec.vocab_size}"
        raise UserError(f"preserve_data: {what}; the tokenizer is of another model")
    return ids

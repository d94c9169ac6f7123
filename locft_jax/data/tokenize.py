"""Texts -> token ids, each text once: prompts as a model is asked, and training texts with their targets."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.data.packing import Corpus, corpus_from_lists
from locft_jax.errors import UserError, cause, is_panic


class TextEncoder:
    """A tokenizer that tokenizes every text once. Its lists are its own and must not be changed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[bool, dict[str, list[int]]] = {True: {}, False: {}}

    def ids(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text, with `special` tokens or without. Raises UserError where the tokenizer fails."""
        known = self._known[special]
        if unseen := [text for text in dict.fromkeys(texts) if text not in known]:
            options = {} if special else {"add_special_tokens": False}
            try:
                found = self.tokenizer(unseen, **options)["input_ids"]
            except BaseException as e:  # a damaged tokenizer.json may fail at some texts only, and in any way
                if isinstance(e, MemoryError) or not (isinstance(e, Exception) or is_panic(e)):
                    raise
                wrong = f"model: its tokenizer fails ({cause(e)})"
                raise UserError(f"{wrong}; fetch the tokenizer's files again") from None
            known.update(zip(unseen, found, strict=True))
        return [known[text] for text in texts]

    @functools.cached_property
    def closing(self) -> int:
        """How many special tokens the tokenizer appends to a text (T5-like ones add EOS)."""
        plain, full = self.ids(["a"], special=False)[0], self.ids(["a"])[0]
        ends = range(len(full), len(plain) - 1, -1)
        return next((len(full) - end for end in ends if full[end - len(plain) : end] == plain), 0)


def as_encoder(tokenizer: Any) -> TextEncoder:
    """A tokenizer as a `TextEncoder`, which it may be already."""
    return tokenizer if isinstance(tokenizer, TextEncoder) else TextEncoder(tokenizer)


def prompt_ids(tokenizer: Any, prompts: Sequence[str], chat_template: bool = False) -> list[list[int]]:
    """Prompts -> ids as the tokenizer makes them by default (BOS where it adds one), without special tokens
    that would close them; with `chat_template`, as one user message and the opening of the answer."""
    encoder = as_encoder(tokenizer)
    if not chat_template:
        return [ids[: len(ids) - encoder.closing] for ids in encoder.ids(prompts)] if prompts else []
    wrong, fill = "chat_template: this model's", encoder.tokenizer.apply_chat_template
    if not encoder.tokenizer.chat_template:
        raise UserError(f"{wrong} tokenizer has no chat template; use chat_template=false")
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    try:
        texts = [fill(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    except Exception as e:  # a template is a program: it may fail in any way
        raise UserError(f"{wrong} template fails ({cause(e)}); use chat_template=false") from None
    return encoder.ids(texts, special=False)


def spaced(target: str) -> str:
    """The reference puts one space before a target that does not begin with one."""
    return target if target.startswith(" ") else " " + target


def encode_pairs(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str], *, eos: int | None = None,
    chat_template: bool = False, max_length: int | None = None, vocab_size: int | None = None,
) -> Corpus:  # fmt: skip
    """Training texts: prompt + " " + target (+ EOS), tokenized together as the reference does.
    Raises UserError for a target or prompt without tokens, a text too long, or an id beyond `vocab_size`.

    The target begins where the prompt's own tokens end. Where a merge crosses that boundary (the prompt's ids
    are not a prefix of the text's) the reference would mask the wrong tokens; here the prompt keeps its ids,
    so that what is trained is what generation will meet, and the case is counted. With a chat template the
    answer follows the template without a space.

    Args:
        tokenizer: a Hugging Face fast tokenizer, or a `TextEncoder`.
        prompts: one for each target.
        targets: what each prompt is to be continued with.
        eos: the id that ends every text; None: none.
        chat_template: put the prompts into the tokenizer's template.
        max_length: of a text, in tokens.
        vocab_size: ids must be below it.
    """
    encoder = as_encoder(tokenizer)
    heads, merges = prompt_ids(encoder, prompts, chat_template), 0
    if chat_template:
        tails = encoder.ids([t.strip() for t in targets], special=False)
    else:
        texts = [p + spaced(t) for p, t in zip(prompts, targets, strict=True)]
        tails = []
        for i, (head, whole) in enumerate(zip(heads, encoder.ids(texts), strict=True)):
            whole = whole[: len(whole) - encoder.closing]
            if whole[: len(head)] == head:
                tails.append(whole[len(head) :])
            else:
                merges += 1
                tails.append(_target_alone(encoder, head, targets[i], texts[i]))
    parts = []
    for prompt, target, head, tail in zip(prompts, targets, heads, tails, strict=True):
        # What the vocabulary lacks may vanish, and leave the space before it.
        if not head or not tail or (len(tail) <= 2 and not encoder.tokenizer.decode(tail).strip()):
            what = "prompt" if not head else "target"
            raise UserError(f"data: the {what} of {prompt!r} -> {target!r} has no tokens in this vocabulary")
        parts.append([*head, *tail] + ([] if eos is None else [eos]))
    corpus = corpus_from_lists(parts, [*map(len, heads)], merges)
    check_texts(corpus, prompts, max_length, vocab_size)
    return corpus


def check_prompts(
    prompts: Sequence[str], ids: Sequence[Sequence[int]], max_length: int | None = None,
    vocab_size: int | None = None,
) -> None:  # fmt: skip
    """Raise UserError, as `encode_pairs` does, for prompts without a target."""
    if not all(ids):
        empty = next(prompt for prompt, own in zip(prompts, ids, strict=True) if not own)
        raise UserError(f"data: the prompt {empty!r} has no tokens in this vocabulary")
    check_texts(corpus_from_lists(ids, np.zeros(len(ids))), prompts, max_length, vocab_size)


def check_texts(
    corpus: Corpus, prompts: Sequence[str], max_length: int | None, vocab_size: int | None
) -> None:
    """Raise UserError for texts that the model has no room or no embedding for."""
    begins = lambda i: f"in the text that begins {prompts[i][:60]!r}"  # noqa: E731
    if max_length is not None and (corpus.lengths > max_length).any():
        long = np.flatnonzero(corpus.lengths > max_length)
        more = f" ({len(long)} such texts in all)" if len(long) > 1 else ""
        wrong = f"data: {corpus.lengths[long[0]]} tokens {begins(long[0])}{more}"
        raise UserError(f"{wrong}, the model's context holds {max_length}; shorten or drop it")
    if vocab_size is not None and len(corpus.tokens) and corpus.tokens.max() >= vocab_size:
        at = int(np.argmax(corpus.tokens >= vocab_size))
        which = int(np.searchsorted(corpus.offsets, at, "right")) - 1
        wrong = f"model: its tokenizer gives id {corpus.tokens[at]} {begins(which)}"
        remedy = "put the tokenizer that belongs to these weights into the folder"
        raise UserError(f"{wrong}, but its vocab_size is {vocab_size}; {remedy}")


def _target_alone(encoder: TextEncoder, head: list[int], target: str, text: str) -> list[int]:
    """Ids of the target by itself that continue `head` to the right text: with its space, or without where
    the tokenizer puts one before every word (sentencepiece)."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    found = encoder.ids([spaced(target), target.lstrip(" ")], special=False)
    right = (ids for ids in found if encoder.tokenizer.decode([*head, *ids], **options) == text)
    return next(right, found[0])

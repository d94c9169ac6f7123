"""data.tokenize."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.data.packing import Corpus, corpus_from_lists
from locft_jax.errors import UserError, is_panic


def prompt_ids(tokenizer: Any, prompts: Sequence[str], chat_template: bool = False) -> list[list[int]]:
    """Prompts -> ids as the tokenizer makes them by default (BOS where it adds one), without special
    tokens that would close them; with `chat_template`, as one user message and the opening of the answer.
    """
    if not prompts:
        return []
    if not chat_template:
        closing = _closing_specials(tokenizer)
        return [ids[: len(ids) - closing] for ids in _tokenize(tokenizer, prompts)]
    if not tokenizer.chat_template:
        raise UserError("chat_template: this model's tokenizer has no chat template; use chat_template=false")
    messages = [[{"role": "user", "content": p}] for p in prompts]
    fill = lambda m: tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)  # noqa: E731
    try:
        texts = [fill(m) for m in messages]
    except Exception as e:  # a template is a program: it may fail in any way
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(
            f"chat_template: this model's template fails ({reason}); use chat_template=false"
        ) from None
    return _tokenize(tokenizer, texts, add_special_tokens=False)


def _tokenize(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    try:
        return tokenizer(list(texts), **options)["input_ids"]
    except BaseException as e:  # a damaged tokenizer.json may fail at some texts only, and in any way
        if isinstance(e, MemoryError) or not (isinstance(e, Exception) or is_panic(e)):
            raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"model: its tokenizer fails ({reason}); fetch the tokenizer's files again") from None


def spaced(target: str) -> str:
    """The reference puts one space before a target that does not begin with one."""
    return target if target.startswith(" ") else " " + target


def encode_pairs(
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    eos: int | None = None,
    chat_template: bool = False,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    """Training texts: prompt + " " + target (+ EOS), tokenized together as the reference does.

    The target begins where the prompt's own tokens end. Where a merge crosses that boundary (the
    prompt's ids are not a prefix of the text's) the reference would mask the wrong tokens; here
    the prompt keeps its ids, so that what is trained is what generation will meet, and the case
    is counted. With a chat template the answer follows the template without a space.

    Raises UserError for a target without tokens, a prompt without tokens, a text longer than
    `max_length`, or an id beyond `vocab_size`.
    """
    heads = prompt_ids(tokenizer, prompts, chat_template)
    if chat_template:
        tails = _tokenize(tokenizer, [t.strip() for t in targets], add_special_tokens=False)
        merges = 0
    else:
        texts = [p + spaced(t) for p, t in zip(prompts, targets, strict=True)]
        wholes = _tokenize(tokenizer, texts) if texts else []
        suffix = _closing_specials(tokenizer)
        tails, merges = [], 0
        for i, (head, whole) in enumerate(zip(heads, wholes, strict=True)):
            whole = whole[: len(whole) - suffix]
            if whole[: len(head)] == head:
                tails.append(whole[len(head) :])
            else:
                merges += 1
                tails.append(_target_alone(tokenizer, head, targets[i], texts[i]))
    parts, starts = [], []
    for prompt, target, head, tail in zip(prompts, targets, heads, tails, strict=True):
        # What the vocabulary lacks may vanish, and leave the space before it.
        if not head or not tail or (len(tail) <= 2 and not tokenizer.decode(tail).strip()):
            what = "prompt" if not head else "target"
            raise UserError(f"data: the {what} of {prompt!r} -> {target!r} has no tokens in this vocabulary")
        parts.append([*head, *tail] + ([] if eos is None else [eos]))
        starts.append(len(head))
    corpus = corpus_from_lists(parts, starts, merges)
    _check(corpus, prompts, max_length, vocab_size)
    return corpus


def check_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    chat_template: bool = False,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> None:
    """Raise UserError, as `encode_pairs` does, for prompts that nobody knows the answer to."""
    heads = prompt_ids(tokenizer, prompts, chat_template)
    for prompt, head in zip(prompts, heads, strict=True):
        if not head:
            raise UserError(f"data: the prompt {prompt!r} has no tokens in this vocabulary")
    _check(corpus_from_lists(heads, np.zeros(len(heads))), prompts, max_length, vocab_size)


def _check(corpus: Corpus, prompts: Sequence[str], max_length: int | None, vocab_size: int | None) -> None:
    """Raise UserError for texts that the model has no room or no embedding for."""
    begins = lambda i: f"the text that begins {prompts[i][:60]!r}"  # noqa: E731
    if max_length is not None and (corpus.lengths > max_length).any():
        long = np.flatnonzero(corpus.lengths > max_length)
        more = f" ({len(long)} such texts in all)" if len(long) > 1 else ""
        raise UserError(
            f"data: {corpus.lengths[long[0]]} tokens in {begins(long[0])}{more}, "
            f"the model's context holds {max_length}; shorten or drop it"
        )
    if vocab_size is not None and len(corpus.tokens) and corpus.tokens.max() >= vocab_size:
        at = int(np.argmax(corpus.tokens >= vocab_size))
        which = int(np.searchsorted(corpus.offsets, at, "right")) - 1
        raise UserError(
            f"model: its tokenizer gives id {corpus.tokens[at]} in {begins(which)}, but its vocab_size is "
            f"{vocab_size}; put the tokenizer that belongs to these weights into the folder"
        )


def _closing_specials(tokenizer: Any) -> int:
    """How many special tokens the tokenizer appends to a text (T5-like ones add EOS)."""
    plain = _tokenize(tokenizer, ["a"], add_special_tokens=False)[0]
    full = _tokenize(tokenizer, ["a"])[0]
    for end in range(len(full), len(plain) - 1, -1):
        if full[end - len(plain) : end] == plain:
            return len(full) - end
    return 0


def _target_alone(tokenizer: Any, head: list[int], target: str, text: str) -> list[int]:
    """Ids of the target by itself that continue `head` to the right text: with its space, or
    without where the tokenizer puts one before every word (sentencepiece)."""
    spellings = [spaced(target), target.lstrip(" ")]
    with_space, without = _tokenize(tokenizer, spellings, add_special_tokens=False)
    for ids in (with_space, without):
        whole = tokenizer.decode([*head, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if whole == text:
            return ids
    return with_space

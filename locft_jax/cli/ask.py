"""Ask a model, and with a delta the edited model too: `python -m locft_jax.ask --model DIR "prompt" ...`

Greedy answers, ended by the first `.`, newline or EOS, as everywhere here. Without a prompt, or with
`-`, the prompts are read from standard input, one a line.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from locft_jax.config import Config, load_config
from locft_jax.data.tokenize import check_prompts, prompt_ids
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import NEW_TOKENS
from locft_jax.evaluation.report import plain
from locft_jax.evaluation.scoring import cut, stop_tables
from locft_jax.evaluation.verify import Prompts, answer
from locft_jax.io.delta import check_delta, load_delta
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import frozen_dtype, load_opened, load_tokenizer
from locft_jax.io.remote import place
from locft_jax.model.memory import check_memory
from locft_jax.model.model import Model
from locft_jax.model.sharding import make_mesh


def main(argv: list[str] | None = None) -> None:
    """config -> prompts -> model -> answers."""
    args = parse(argv)
    pairs = [f"model_name_or_path={args.model}", *args.set]
    config = load_config(None, pairs)

    # Everything that can be wrong is looked at before any weight is loaded.
    prompts = read_prompts(args.prompts)
    checkpoint = open_folder(config.model_name_or_path)
    tokenizer = load_tokenizer(checkpoint)
    mesh = make_mesh(config.mesh)
    delta = load_delta(args.delta) if args.delta else None
    if delta:
        check_delta(checkpoint, delta)
    ids = encode_prompts(tokenizer, prompts, config, args.max_tokens, checkpoint.spec.max_position)
    check_prompts(tokenizer, prompts, config.chat_template, vocab_size=checkpoint.spec.vocab_size)
    itemsize = frozen_dtype(checkpoint, config.weights).itemsize
    check_memory(checkpoint.spec, mesh, itemsize, int8=config.weights == "int8")

    model = load_opened(checkpoint, tokenizer, mesh, config.weights)
    if delta:
        # The base's own tensors as edits: the same compiled code then serves before and after.
        states = {"before": model.with_overrides(delta.base), "after": model.with_overrides(delta.new)}
    else:
        states = {"answer": model}
    table = Table("prompt")
    columns = []
    guesses: list[list[int]] = [[] for _ in ids]
    for name, state in states.items():
        table.add_column(name, overflow="fold")
        texts, guesses = answers(state, ids, guesses, args.max_tokens, config.row_length)
        columns.append(texts)
    for row in zip(prompts, *columns, strict=True):
        table.add_row(*map(plain, row))
    Console().print(table)


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts of the command line, or the lines of standard input. Raises UserError for none, an empty
    one, or one that is not UTF-8."""
    where, prompts = "prompt", list(given)
    if not prompts or prompts == ["-"]:
        if sys.stdin and sys.stdin.isatty():
            print("prompts, one a line; Ctrl-D ends them:", file=sys.stderr)
        where = "line"
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if sys.stdin else ""
        prompts = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if not prompts:
        raise UserError("ask: no prompts; give some as arguments, or on standard input, one a line")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"ask: {where} {number} is empty; give each prompt some text")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"ask: {where} {number} is not valid UTF-8") from None
    return prompts


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], config: Config, new_tokens: int, limit: int
) -> list[list[int]]:
    """Token ids of the prompts. Raises UserError for one without tokens, or one that leaves no room for
    an answer of `new_tokens` in a context of `limit`."""
    ids = prompt_ids(tokenizer, prompts, config.chat_template)
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise UserError(f"ask: {prompt!r} has no tokens in this model's vocabulary")
        if len(tokens) + new_tokens > limit:
            raise UserError(
                f"ask: {len(tokens)} tokens in the prompt that begins {prompt[:60]!r} and up to {new_tokens} "
                f"of its answer; the model's context holds {limit}: shorten it, or lower --max-tokens"
            )
    return ids


def answers(
    model: Model, ids: list[list[int]], guesses: list[list[int]], new_tokens: int, row_length: int
) -> tuple[list[str], list[list[int]]]:
    """Texts by the official stop rule, and token ids. `guesses` only decide how fast that is."""
    stop, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    tokens, _ = answer(model, Prompts(ids, guesses, new_tokens, stop), row_length)
    return [cut(t) for t in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)], tokens


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m locft_jax.ask", description=__doc__)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="prompt", help="what to ask; none, or -: lines of standard input")
    add("--model", required=True, help="model folder or Hub id")
    add("--delta", type=place, help="delta.safetensors: answers before and after it, side by side")
    add("--max-tokens", type=int, default=NEW_TOKENS, help=f"of an answer (default: {NEW_TOKENS})")
    add("--set", action="append", default=[], metavar="key=value", help="override a key; may be repeated")
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: it must be 1 or more")
    return args


"""Ask a model, and with a delta the edited model too. Greedy answers, ended by the first `.`, newline or EOS,
as everywhere here. Without a prompt, or with `-`, the prompts are read from standard input, one a line; after
`--` all words are prompts."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from locft_jax.cli.main import new_parser, parse_words
from locft_jax.config import load_config
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import NEW_TOKENS, Probe
from locft_jax.evaluation.report import plain
from locft_jax.evaluation.scoring import cut, stop_tables
from locft_jax.evaluation.verify import Prompts, answer
from locft_jax.io.delta import load_delta
from locft_jax.io.remote import path_or_url
from locft_jax.logs import log
from locft_jax.prepare import Prepared, no_site, prepare


def main(argv: list[str] | None = None) -> None:
    """config -> prompts -> model -> answers."""
    args = parse(argv)
    config = load_config(None, [f"model_name_or_path={args.model}", *args.pairs])
    prompts = read_prompts(args.rest)
    probes = [Probe(str(i), "ask", prompt, None) for i, prompt in enumerate(prompts)]
    prepared = prepare(config, probes=probes, sites=no_site)
    prepared = prepared.over(load_delta(args.delta)) if args.delta else prepared
    ids = prompt_ids(prepared, args.max_tokens)
    for note in prepared.notes:
        log.warning(note)
    model = prepared.load()
    states = {"answer": model}
    if delta := prepared.delta:
        # The base's own tensors as overrides: the same compiled code then serves before and after.
        states = {"before": model.with_overrides(delta.base), "after": model.with_overrides(delta.new)}
    stop, _ = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    table, columns = Table("prompt"), [prompts]
    drafts: list[list[int]] = [[] for _ in ids]
    for name, state in states.items():
        table.add_column(name, overflow="fold")
        drafts, _ = answer(state, Prompts(ids, drafts, args.max_tokens, stop), config.row_length)
        columns.append([*map(cut, model.tokenizer.batch_decode(drafts, skip_special_tokens=True))])
    for row in zip(*columns, strict=True):
        table.add_row(*map(plain, row))
    Console().print(table)


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts of the command line, or the lines of standard input. Raises UserError for a bad one."""
    where, prompts = "prompt", list(given)
    if prompts in ([], ["-"]):
        if sys.stdin and sys.stdin.isatty():
            print("prompts, one a line; Ctrl-D ends them:", file=sys.stderr)
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if sys.stdin else ""
        where, prompts = "line", [line.rstrip("\r") for line in text.removesuffix("\n").split("\n") if text]
    if not prompts:
        raise UserError("ask: no prompts; give some as arguments, or on standard input, one a line")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"ask: {where} {number} is empty; give each prompt some text")
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"ask: {where} {number} is not valid UTF-8")
    return prompts


def prompt_ids(prepared: Prepared, new_tokens: int) -> list[list[int]]:
    """Token ids of the prompts. Raises UserError for one that leaves no room for an answer."""
    questions, limit = prepared.questions, prepared.base.spec.max_position
    assert questions is not None
    for probe, ids in zip(questions.probes, questions.prompts, strict=True):
        if len(ids) + new_tokens > limit:
            wrong = f"ask: {len(ids)} tokens in the prompt that begins {probe.prompt[:60]!r} and up to"
            right = f"the context holds {limit}: shorten it, or lower --max-tokens"
            raise UserError(f"{wrong} {new_tokens} of its answer; {right}")
    return questions.prompts


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides, `rest` its prompts."""
    parser = new_parser("ask", __doc__, "prompt")
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--delta", type=path_or_url, help="delta.safetensors: answers before and after it")
    parser.add_argument("--max-tokens", type=int, default=NEW_TOKENS, help=f"default: {NEW_TOKENS}")
    args = parse_words(parser, argv, text=True)
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: it must be 1 or more")
    return args

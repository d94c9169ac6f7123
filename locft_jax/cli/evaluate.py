"""Measure a model, edited or not: every probe of some edits, and questions that no edit is about."""

import argparse

from rich.console import Console
from rich.table import Table

from locft_jax import api, distributed
from locft_jax.cli.main import new_parser, parse_words
from locft_jax.config import OVERRIDES, load_config
from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.io import outputs
from locft_jax.io.atomic import write_json
from locft_jax.io.delta import load_delta
from locft_jax.io.remote import path_or_url
from locft_jax.logs import log
from locft_jax.prepare import no_site, prepare


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """config -> prepare -> model -> evaluation -> results."""
    config = load_config(None, [f"model_name_or_path={args.model}", f"data_path={args.data}", *args.pairs])
    first = distributed.first()  # the process that writes and prints
    if args.out and first:
        outputs.check_file(args.out, args.overwrite)
    prepared = prepare(config, sites=no_site)
    prepared = prepared.over(load_delta(args.delta)) if args.delta else prepared
    if distributed.several():
        distributed.agree(prepared.identity(), last=True)
    for note in prepared.notes:
        log.warning(note)
    model = prepared.load()
    model = model.with_overrides(prepared.delta.new) if prepared.delta else model
    report, lines = api.evaluate_prepared(model, prepared, show=True)
    if not first:
        return
    table = Table("figure", title=plain(f"{args.model}, {report['edits']} edits"), title_justify="left")
    table.add_column("rate", justify="right")
    for key, value in report["figures"].items():
        if value is not None:
            table.add_row(key, f"{100 * value:.1f} %")
    Console().print(table)
    if args.out:
        with outputs.result_file(args.out) as part:
            write_json(part, {"model": args.model, **report, "predictions": lines})


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = new_parser("evaluate", __doc__, "key=value")
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--delta", type=path_or_url, help="delta.safetensors to apply in memory first")
    parser.add_argument("--data", required=True, help="edits whose probes are asked: file or Hub id")
    parser.add_argument("--out", type=path_or_url, help="JSON file for the figures and every answer")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out when done")
    distributed.add_flags(parser)
    args = parse_words(parser, argv)
    if args.rest:
        raise UserError(f"{OVERRIDES}: {args.rest[0]!r} is no key=value")
    return args

"""Measure a model, edited or not: `python -m locft_jax.evaluate --model DIR --data FILE`."""

import argparse

from rich.console import Console
from rich.table import Table

from locft_jax import api, distributed
from locft_jax.config import load_config
from locft_jax.data.capability import read_capability
from locft_jax.data.requests import read_requests
from locft_jax.evaluation.probes import check_probes, make_probes
from locft_jax.evaluation.report import plain
from locft_jax.io import outputs
from locft_jax.io.atomic import write_json
from locft_jax.io.delta import check_delta, load_delta
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import frozen_dtype, load_opened, load_tokenizer
from locft_jax.io.remote import place
from locft_jax.model.memory import check_memory
from locft_jax.model.sharding import make_mesh
from locft_jax.run_identity import describe_run


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """config -> data -> model -> evaluation -> export."""
    pairs = [f"model_name_or_path={args.model}", f"data_path={args.data}"]
    config = load_config(None, pairs + [pair for group in args.set for pair in group])

    # Everything that can be wrong is looked at before any weight is loaded.
    first = distributed.first()  # the process that writes and prints
    if args.out and first:
        outputs.check_file(args.out, args.overwrite)
    data = read_requests(args.data, config.num_edits, config.on_conflict)
    capability = read_capability(config.capability_data) if config.capability_data else []
    checkpoint = open_folder(args.model)
    tokenizer = load_tokenizer(checkpoint)
    mesh = make_mesh(config.mesh)
    delta = load_delta(args.delta) if args.delta else None
    if delta:
        check_delta(checkpoint, delta)

    probes = make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases)
    check_probes(tokenizer, checkpoint.spec, probes, capability, config.chat_template)
    itemsize = frozen_dtype(checkpoint, config.weights).itemsize
    check_memory(checkpoint.spec, mesh, itemsize, int8=config.weights == "int8")
    if distributed.several():
        distributed.agree(describe_run(config, data, capability, checkpoint, (), mesh, delta), last=True)

    model = load_opened(checkpoint, tokenizer, mesh, config.weights)
    model = model.with_overrides(delta.new) if delta else model
    report, lines = api.evaluate(model, data, capability, config, show=True)
    if not first:
        return

    table = Table(title=plain(f"{args.model}, {report['edits']} edits"), title_justify="left")
    table.add_column("figure")
    table.add_column("rate", justify="right")
    for key, value in report["figures"].items():
        if value is not None:
            table.add_row(key, f"{100 * value:.1f} %")
    Console().print(table)
    if args.out:
        with outputs.result_file(args.out) as part:
            write_json(part, {"model": args.model, **report, "predictions": lines})


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m locft_jax.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--delta", type=place, help="delta.safetensors to apply in memory first")
    parser.add_argument("--data", required=True, help="edits whose probes are asked: file or Hub id")
    parser.add_argument("--out", type=place, help="JSON file for the figures and every answer")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out when done")
    parser.add_argument(
        "--set", action="append", default=[], nargs="+", metavar="key=value", help="override a key"
    )
    distributed.add_flags(parser)
    return parser.parse_args(argv)


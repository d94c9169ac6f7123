"""Does an edit fit, before there is a machine: the programs of the edit are compiled for a TPU topology with
the TPU's own compiler, on any machine and without weights. A folder's or a bare config.json is enough;
nothing is downloaded."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from locft_jax.cli.main import new_parser, parse_config
from locft_jax.config import load_config
from locft_jax.logs import log
from locft_jax.studies.plan.fit import as_report, plan, print_plan, smallest
from locft_jax.studies.plan.programs import make_case
from locft_jax.studies.plan.topology import all_slices, larger, parse_topology, prepare_compiler


def main(argv: list[str] | None = None) -> None:
    """config -> shapes -> topology -> compiler -> table."""
    args = parse(argv)
    config = load_config(args.config, args.pairs)
    topology = None if args.topology == "auto" else parse_topology(args.topology, args.memory)
    case, notes = make_case(config, args.model_config)
    if topology is None or topology.compiles:
        prepare_compiler()
    for note in notes:
        log.warning(note)
    if topology is None:
        outcome = other = smallest(case, all_slices())
    else:
        outcome = plan(case, topology)
        other = outcome if outcome.fits else smallest(case, larger(topology))
    if args.json:
        print(json.dumps(as_report(case, outcome, other, notes)))
    else:
        print_plan(case, outcome, other, Console(markup=False, emoji=False))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = new_parser("plan", __doc__, "CONFIG.yaml | key=value")
    add = parser.add_argument
    add("--topology", default="auto", metavar="NAME", help="v5e:4x4, v5e-8 (one host), v5p:2x2x1, gpu:8, "
        "cpu:8, ..., or auto (default): the TPU slice with the least memory that it fits")  # fmt: skip
    add("--weights", choices=("bf16", "float32", "int8"), help="the same as weights=...")
    add("--batch_size", metavar="N", help="the same as batch_size=N")
    add("--seq", metavar="N", help="tokens a packed row: the same as row_length=N")
    add("--memory", type=float, metavar="GIB", help="memory of a device, in place of the usual")
    add("--model-config", type=Path, metavar="FILE", help="config.json of the model, where no folder is here")
    add("--json", action="store_true", help="one JSON object on standard output in place of the table")
    args = parse_config(parser, argv)
    given = {"weights": args.weights, "batch_size": args.batch_size, "row_length": args.seq}
    args.pairs += [f"{k}={v}".replace("bf16", "bfloat16") for k, v in given.items() if v is not None]
    return args

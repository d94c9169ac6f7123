"""Find where to edit a model: the same edits are made at one site after another (modules x layers) and
measured. The result is a table, two pictures and the site to use; `layer` and `rewrite_module` of the config
are what is looked for. With neither a config nor a model the bundled demo is looked at."""

import argparse
import dataclasses
import time
from pathlib import Path

from rich.console import Console

from locft_jax import distributed
from locft_jax.cli.main import new_parser, parse_config, split_words
from locft_jax.config import Config, load_config
from locft_jax.editing.checkpointer import open_run
from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.evaluation.scoring import counts
from locft_jax.io import outputs
from locft_jax.io.atomic import whole_folder
from locft_jax.logs import Bar, log
from locft_jax.prepare import prepare
from locft_jax.studies.locate.measure import Bench, compilations
from locft_jax.studies.locate.places import MODULES, STUDIED, Plan, make_plan
from locft_jax.studies.locate.results import finished, print_results, write_results
from locft_jax.studies.tables import Lines, describe_figures

EDITS, PROBES = 200, 1000  # the sample, where the config says nothing


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """config -> prepare -> model -> every site edited and measured -> table, pictures, recommendation."""
    first = distributed.first()  # the process that writes and prints
    given = load_config(args.config, args.pairs)
    out = outputs.local_place(args.out or f"{given.output_dir or f'runs/{given.name}'}-locate")
    console = Console(markup=False, emoji=False, highlight=False, quiet=not first)
    if first:
        outputs.check_out(out, args.overwrite, args.resume, proof="sites.json")
    asked = args.modules, args.layers, args.strategy, args.from_sibling
    sites = lambda spec, _: [place.tensors for place in make_plan(spec, *asked).all()]  # noqa: E731
    prepared = prepare(sample(given), sites=sites)
    plan, edits, questions = make_plan(prepared.base.spec, *asked), prepared.data.requests, prepared.questions
    assert questions is not None
    run = prepared.identity() | plan.describe()
    over = first and args.resume and finished(out, run)
    distributed.agree(run)
    if distributed.from_first(over):
        return console.print(plain(f"{out}/ holds this table, finished: nothing to resume"))
    checkpoint = open_run(out, run, args.resume)
    lines = Lines(checkpoint / "sites.jsonl")
    for note in prepared.notes:
        log.warning(note)
    console.print(f"{len(edits)} edits, {len(questions.probes)} probes, {plan.size()}")

    begin = time.monotonic()
    programs = compilations(checkpoint / "compiled" if first else None)
    with lines.resumable("sites measured so far"), programs as compiled:
        bench = Bench(prepared.load(), prepared, checkpoint)
        measure_places(plan, bench, lines)
        if not first:
            return
        facts = {
            "model": given.model_name_or_path,
            "layers": plan.spec.n_layers,
            "edits": len(edits),
            "probes": counts(questions),
            "before": bench.unedited(),
            "compilations": dict(compiled),
            "seconds": time.monotonic() - begin,
        }
        with whole_folder(out) as folder:
            result = write_results(folder, lines, facts, run)
    print_results(result, console)
    steps, every = compiled["train_step"], compiled.total()
    console.print(f"{steps} training steps and {every - steps} other programs; {facts['seconds']:.0f} s")
    console.print(plain(f"written to {out}/: " + ", ".join(sorted(p.name for p in out.iterdir()))))


def sample(config: Config) -> Config:
    """The config of a run that edits at many sites: a sample of edits and probes where it names none. Raises
    UserError for a config that cannot be measured."""
    if not config.evaluate:
        raise UserError("evaluate: locate measures every site; use evaluate=true")
    edits, probes = config.num_edits or EDITS, config.eval_sample or PROBES
    config = dataclasses.replace(config, num_edits=edits, eval_sample=probes, eval_every=None, export=())
    return dataclasses.replace(config, layer=None, rewrite_module=Config.rewrite_module)


def measure_places(plan: Plan, bench: Bench, lines: Lines) -> None:
    """Add a line for every place of the plan that has none yet."""
    seen = {(line["layer"], line["module"]) for line in lines}
    for name, places in plan.rounds(lines):
        with Bar(name, len(places)) as bar:
            bar.skip(sum(place.key in seen for place in places))
            for place in [place for place in places if place.key not in seen]:
                line = lines.keep(bench.measure(place))
                bar.advance(1, f"layer {place.layer} {place.module}: {describe_figures(line)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = new_parser("locate", __doc__, "CONFIG.yaml | key=value")
    parser.epilog = f"Without num_edits: {EDITS} edits. Without eval_sample: {PROBES} probes a kind at most."
    add = parser.add_argument
    add("--out", help="folder for the results (default: output_dir or runs/NAME, and -locate)")
    add("--overwrite", action="store_true", help="replace an existing --out when the run is done")
    add("--resume", action="store_true", help="continue the interrupted run in --out, if there is one")
    add("--modules", nargs="+", metavar="MODULE", help=f"any of {' '.join(MODULES)}, or templates with {{}} "
        f"for the layer (default: {' '.join(STUDIED)})")  # fmt: skip
    add("--layers", nargs="+", metavar="L", help="only these layers (default: all)")
    add("--strategy", choices=("all", "coarse"), default="all", help="coarse: every k-th layer, then those "
        "around the best, k about the root of the number of layers")  # fmt: skip
    add("--from-sibling", type=Path, metavar="FILE", help="sites.json of a smaller model: measure only its "
        "recommended module, at the same relative depth")  # fmt: skip
    distributed.add_flags(parser)
    args = parse_config(parser, argv)
    for name in ("modules", "layers"):  # overrides may follow their words
        pairs, words = split_words(getattr(args, name) or [])
        args.pairs += pairs
        setattr(args, name, words)
    if bad := [word for word in args.layers if not word.isdecimal()]:
        raise UserError(f"--layers: {bad[0]!r} is no layer; give numbers from 0")
    args.layers = [int(word) for word in args.layers]
    if args.from_sibling and (args.modules or args.layers or args.strategy == "coarse"):
        raise UserError("--from-sibling: leave out --modules, --layers and --strategy, which it decides")
    return args

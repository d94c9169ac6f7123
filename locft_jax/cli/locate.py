"""Find where to edit a model: `python -m locft_jax.locate [CONFIG.yaml] [--set key=value ...]`.

The same edits are made at one site after another (modules x layers) and measured; the result is a table, two
pictures and the site to use. `layer` and `rewrite_module` of the config are what is looked for. With neither
a config nor a model the bundled demo is looked at.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from locft_jax import distributed
from locft_jax.config import Config, load_config
from locft_jax.data.capability import read_capability
from locft_jax.data.packing import Corpus
from locft_jax.data.requests import read_requests
from locft_jax.editing.augment import written_prefixes
from locft_jax.editing.regularizers.preconditioner import check_preserve
from locft_jax.editing.regularizers.texts import encode_retained, retained_texts, unused
from locft_jax.editing.run import check_fit, encode_requests
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import make_probes, make_questions
from locft_jax.evaluation.report import plain
from locft_jax.evaluation.scoring import counts
from locft_jax.io import outputs
from locft_jax.io.atomic import whole_folder
from locft_jax.io.hf_folder import HFFolder, open_folder
from locft_jax.io.hf_load import load_opened, load_tokenizer
from locft_jax.logs import Bar, log
from locft_jax.model.sharding import make_mesh
from locft_jax.run_identity import describe_run
from locft_jax.studies.locate.compiled import compilations
from locft_jax.studies.locate.measure import Bench
from locft_jax.studies.locate.places import MODULES, STUDIED, Place, Plan, make_plan
from locft_jax.studies.locate.table import Table, finished, open_table, print_results, write_results
from locft_jax.studies.tables import describe_figures

EDITS, PROBES = 200, 1000  # the sample, where the config says nothing


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """config -> data -> model -> every site edited and measured -> table, pictures, recommendation."""
    first = distributed.first()  # the process that writes and prints
    given = load_config(args.config, args.pairs)
    config = sample(given)
    out = outputs.local_place(args.out or f"{given.output_dir or f'runs/{given.name}'}-locate")
    console = Console(markup=False, emoji=False, quiet=not first)

    # Everything that can be wrong is looked at before any weight is loaded.
    if first:
        outputs.check_out(out, args.overwrite, args.resume, proof="sites.json")
    if config.data_path is None:
        raise UserError("data_path: no edits given; set data_path to a file of edits (JSON, JSONL or CSV)")
    data = read_requests(config.data_path, config.num_edits, config.on_conflict)
    capability = read_capability(config.capability_data) if config.capability_data else []
    checkpoint = open_folder(config.model_name_or_path)
    tokenizer, mesh = load_tokenizer(checkpoint), make_mesh(config.mesh)
    plan = make_plan(checkpoint.spec, args.modules, args.layers, args.strategy, args.from_sibling)
    retained = retained_texts(config, data.requests)
    encode_retained(tokenizer, checkpoint.spec, config, retained)
    corpus = encode_requests(tokenizer, data.requests, config, checkpoint.spec)
    probes = make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases)
    asked = make_questions(tokenizer, probes, capability, checkpoint.spec, config.chat_template)
    notes = unused(config) + check_places(plan.all(), checkpoint, config, corpus, mesh)
    run = describe_run(config, data, capability, checkpoint, (), mesh, None, retained) | plan.told()
    over = first and args.resume and finished(out, run)
    distributed.agree(run)
    if distributed.from_first(over):
        return console.print(plain(f"{out}/ holds this table, finished: nothing to resume"))
    table = open_table(out, run, args.resume)
    for note in notes:
        log.warning(note)
    console.print(f"{len(data.requests)} edits, {len(probes) + len(capability)} probes, {plan.size()}")

    begin = time.monotonic()
    with table.kept(), compilations(table.folder / "compiled" if first else None) as compiled:
        model = load_opened(checkpoint, tokenizer, mesh, config.weights)
        prefixes = written_prefixes(model, config)
        corpus = encode_requests(tokenizer, data.requests, config, checkpoint.spec, prefixes)
        with Bar("before", len(asked.probes)) as bar:
            bench = Bench(model, corpus, asked, config, retained, table.before(), bar.advance)
        table.keep_before(bench.before)
        measure_places(plan, bench, table)
        facts = {
            "model": config.model_name_or_path,
            "layers": checkpoint.spec.n_layers,
            "edits": len(data.requests),
            "probes": counts(asked),
            "before": bench.unedited(),
            "compilations": dict(compiled),
            "seconds": time.monotonic() - begin,
        }
        if not first:
            return
        with whole_folder(out) as folder:
            result = write_results(folder, table.lines, facts, run)
    print_results(result, console)
    steps, every = compiled["train_step"], compiled.total()
    console.print(f"{steps} training steps and {every - steps} other programs; {facts['seconds']:.0f} s")
    console.print(plain(f"written to {out}/: " + ", ".join(sorted(p.name for p in out.iterdir()))))


def sample(config: Config) -> Config:
    """The config of a run that edits at many sites: a sample of edits and probes where it names none.

    Raises UserError for a config that cannot be measured."""
    if not config.evaluate:
        raise UserError("evaluate: locate measures every site; use evaluate=true")
    return dataclasses.replace(
        config,
        num_edits=config.num_edits or EDITS,
        eval_sample=config.eval_sample or PROBES,
        layer=None,
        rewrite_module=Config.rewrite_module,
        eval_every=None,
        export=(),
    )


def check_places(
    places: Sequence[Place], checkpoint: HFFolder, config: Config, corpus: Corpus, mesh: Mesh
) -> list[str]:
    """Warnings of memory that may not suffice, each once. Raises UserError as `check_preserve` and
    `check_fit` do."""
    notes: dict[str, None] = {}
    for place in places:
        check_preserve(checkpoint.spec, place.tensors, config)
        notes |= dict.fromkeys(check_fit(checkpoint, config, place.tensors, corpus, mesh))
    return list(notes)


def measure_places(plan: Plan, bench: Bench, table: Table) -> None:
    """Fill the table with every place of the plan that it does not hold yet."""
    for name, places in plan.rounds(table.lines):
        with Bar(name, len(places)) as bar:
            for place in places:
                if table.holds(place):
                    bar.skip()
                else:
                    line = table.add(bench.measure(place))
                    bar.advance(1, f"layer {place.layer} {place.module}: {describe_figures(line)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = argparse.ArgumentParser(prog="python -m locft_jax.locate", description=__doc__)
    add = parser.add_argument
    add("config", nargs="?", help="YAML file; without it and without a model: the demo")
    add("--set", action="append", default=[], nargs="+", metavar="key=value", help="override a key; without "
        f"num_edits: {EDITS} edits, without eval_sample: at most {PROBES} probes of a kind")  # fmt: skip
    add("--out", help="folder for the results (default: output_dir or runs/NAME, and -locate)")
    add("--overwrite", action="store_true", help="replace an existing --out when the run is done")
    add("--resume", action="store_true", help="go on with the interrupted run in --out, if there is one")
    add("--modules", nargs="+", metavar="MODULE", help=f"any of {' '.join(MODULES)}, or templates with {{}} "
        f"for the layer (default: {' '.join(STUDIED)})")  # fmt: skip
    add("--layers", nargs="+", type=int, metavar="L", help="only these layers (default: all)")
    add("--strategy", choices=("all", "coarse"), default="all", help="coarse: every k-th layer, then those "
        "around the best, k about the root of the number of layers")  # fmt: skip
    add("--from-sibling", type=Path, metavar="FILE", help="sites.json of a smaller model: measure only its "
        "recommended module, at the same relative depth")  # fmt: skip
    distributed.add_flags(parser)
    args = parser.parse_args(argv)
    args.pairs = [pair for group in args.set for pair in group]
    if args.from_sibling and (args.modules or args.layers or args.strategy == "coarse"):
        raise UserError(
            "--from-sibling: it says which module and layer; leave out --modules, --layers and --strategy"
        )
    return args


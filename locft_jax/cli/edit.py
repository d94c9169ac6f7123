"""Edit facts into a language model: `python -m locft_jax.edit [CONFIG.yaml] [--set key=value ...]`.

With neither a config nor a model the bundled demo runs. `--resume` goes on with a run that was
interrupted; `--continue-from` adds new edits to those of a finished run.
"""

import argparse
import hashlib
import shlex
import shutil
import time

from rich.console import Console

from locft_jax import api, distributed
from locft_jax.config import Config, load_config
from locft_jax.data.capability import read_capability
from locft_jax.data.requests import read_requests
from locft_jax.data.streaming import extend, read_earlier, streaming_report, to_record
from locft_jax.editing.checkpointer import guarded, open_run
from locft_jax.editing.regularizers.preconditioner import check_preserve
from locft_jax.editing.regularizers.texts import check_retained, retained_texts, unused
from locft_jax.editing.run import check_fit, choose_site, encode_requests, last_delta
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import check_probes, make_probes
from locft_jax.evaluation.report import plain, print_report
from locft_jax.io import orbax_export, outputs
from locft_jax.io.atomic import write_json, write_jsonl
from locft_jax.io.delta import save_delta
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_opened, load_tokenizer
from locft_jax.io.hf_save import save_hf, save_hf_at
from locft_jax.io.model_card import readme
from locft_jax.io.remote import check_prefix, place
from locft_jax.logs import log
from locft_jax.model.sharding import make_mesh
from locft_jax.run_identity import describe_run, finished


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """config -> data -> model -> editing -> evaluation -> export."""
    first = distributed.first()  # the process that writes and prints
    earlier = read_earlier(args.continue_from) if args.continue_from else None
    config = load_config(args.config, args.pairs, earlier.settings if earlier else None)
    out, store = outputs.place_of(args.out or config.output_dir or f"runs/{config.name}")
    console = Console(markup=False, emoji=False, quiet=not first)

    # Everything that can be wrong is looked at before any weight is loaded.
    if first:
        outputs.check_out(out, args.overwrite, args.resume)
    if first and store:
        check_prefix(store, args.overwrite, args.resume)
    if config.data_path is None:
        raise UserError("data_path: no edits given; set data_path to a file of edits (JSON, JSONL or CSV)")
    data = read_requests(config.data_path, config.num_edits, config.on_conflict)
    data = extend(earlier, data) if earlier else data
    capability = read_capability(config.capability_data) if config.capability_data else []
    checkpoint = open_folder(config.model_name_or_path)
    tokenizer = load_tokenizer(checkpoint)
    mesh = make_mesh(config.mesh)
    site = choose_site(checkpoint.spec, config)
    check_preserve(checkpoint.spec, site, config)
    retained = retained_texts(config, data.requests)
    check_retained(tokenizer, checkpoint.spec, config, retained)
    corpus = encode_requests(tokenizer, data.requests, config, checkpoint.spec)
    if config.evaluate:
        probes = make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases)
        check_probes(tokenizer, checkpoint.spec, probes, capability, config.chat_template)
    notes = unused(config) + check_fit(checkpoint, config, site, corpus, mesh)
    if first:
        outputs.check_space(out, checkpoint, site, config.export, store)
    start = last_delta(earlier.folder, checkpoint, site) if earlier and args.start_from == "last" else None
    run = describe_run(config, data, capability, checkpoint, site, mesh, start, retained)
    over = first and args.resume and finished(out, run, store)
    distributed.agree(run | {"tokens": hashlib.sha256(corpus.tokens.tobytes()).hexdigest()})
    if distributed.from_first(over):
        return console.print(plain(f"{store or out}/ holds this run, finished: nothing to resume"))
    checkpoints = open_run(out, config.checkpoint_every, run, args.resume)
    distributed.agree(last=True)
    for note in notes:
        log.warning(note)
    console.print(f"{len(data.requests)} edits, {len(site)} tensor(s) from {site[0]} on")

    with guarded(checkpoints):
        begin = time.monotonic()
        model = load_opened(checkpoint, tokenizer, mesh, config.weights)
        loaded = time.monotonic() - begin
        values = start.new if start else None
        result = api.edit(model, data, config, capability, start=values, checkpoints=checkpoints, show=True)
        if not first:
            return
        begin = time.monotonic()
        with outputs.results(out, store) as folder:
            if "delta" in config.export:
                save_delta(result.delta, folder / "delta.safetensors")
            if "hf" in config.export:
                files = readme(checkpoint.path, result.delta.cards())
                if store:
                    save_hf_at(checkpoint, result.delta.new, store / "hf", files)
                else:
                    save_hf(checkpoint, result.delta.new, folder / "hf", files)
            if "orbax" in config.export:
                orbax_export.save_orbax(checkpoint, result.delta.new, folder / "orbax")
            write_jsonl(folder / "edits.jsonl", map(to_record, data.requests))
            write_jsonl(folder / "steps.jsonl", result.steps)
            write_jsonl(folder / "predictions.jsonl", result.predictions)
            result.report["seconds"] |= {"load": loaded, "export": time.monotonic() - begin}
            if earlier:
                batches = result.report["batches"]
                result.report["streaming"] = streaming_report(earlier, batches, args.start_from)
            write_json(folder / "report.json", result.report)
            checkpoints.close()  # it lies in the folder that is replaced
            if args.keep_checkpoint:
                shutil.copytree(checkpoints.folder / "steps", folder / "checkpoint")
    print_report(result.report, result.predictions, console)
    if model.int8 and config.evaluate:
        console.print(plain(f"note: {int8_note(str(store or out), config)}"))
    written = {n.split("/")[0] for n in store.all_names()} if store else {p.name for p in out.iterdir()}
    console.print(plain(f"written to {store or out}/: " + ", ".join(sorted(written))))


def int8_note(out: str, config: Config) -> str:
    """What the figures of a run with int8 frozen weights are figures of, and how to measure its result."""
    quoted = lambda path: shlex.quote(str(path))  # noqa: E731
    if "hf" in config.export:
        model = quoted(f"{out}/hf")
    else:
        model = f"{quoted(config.model_name_or_path)} --delta {quoted(f'{out}/delta.safetensors')}"
    return (
        "these figures are of the model with int8 weights, what was written has full precision; "
        f"python -m locft_jax.evaluate --model {model} --data {quoted(config.data_path)} measures that"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = argparse.ArgumentParser(prog="python -m locft_jax.edit", description=__doc__)
    add = parser.add_argument
    add("config", nargs="?", help="YAML file; without it and without a model: the demo")
    add("--set", action="append", default=[], nargs="+", metavar="key=value", help="override a key")
    add("--out", type=place, help="folder or URL (gs://...) for the results (default: output_dir, "
        "else runs/NAME)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing --out when the run is done")
    add("--resume", action="store_true", help="go on with the interrupted run in --out, if there is one")
    add("--keep-checkpoint", action="store_true", help="leave the last checkpoint in --out when done")
    add("--continue-from", type=place, metavar="OUT", help="add the edits to those of a finished run; its "
        "settings are the defaults, and all edits are trained together")  # fmt: skip
    add("--start-from", choices=("base", "last"), default="base", help="with --continue-from: train from "
        "the base weights (default), or from where that run ended")  # fmt: skip
    distributed.add_flags(parser)
    args = parser.parse_args(argv)
    args.pairs = [pair for group in args.set for pair in group]
    if args.start_from == "last" and not args.continue_from:
        raise UserError("--start-from last: say which run it is with --continue-from OUT")
    return args


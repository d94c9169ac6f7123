"""Edit facts into a language model, and measure it before and after. With neither a config nor a model the
bundled demo runs."""

import argparse
import hashlib
import math
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from locft_jax import api, distributed
from locft_jax.cli.main import new_parser, parse_config
from locft_jax.config import Config, load_config
from locft_jax.data.requests import read_requests
from locft_jax.data.streaming import Earlier, extend, read_earlier, streaming_report, to_record
from locft_jax.editing.checkpointer import Checkpointer, guarded, open_run
from locft_jax.editing.hooks import Hook, Metrics, Profile
from locft_jax.editing.run import last_delta
from locft_jax.editing.site import first_layer
from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain, print_report
from locft_jax.io import orbax_export, outputs
from locft_jax.io.atomic import write_json, write_jsonl
from locft_jax.io.delta import save_delta
from locft_jax.io.hf_load import frozen_dtype
from locft_jax.io.hf_save import save_hf
from locft_jax.io.model_card import readme
from locft_jax.io.remote import Remote, path_or_url
from locft_jax.logs import log
from locft_jax.model.memory import as_text, device_memory, estimate, step_of
from locft_jax.prepare import Prepared, prepare
from locft_jax.run_identity import finished

SHOWN = 3  # training texts that --check prints


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """config -> prepare -> model -> editing -> evaluation -> results."""
    first = distributed.first()  # the process that writes and prints
    earlier = read_earlier(args.continue_from) if args.continue_from else None
    config = load_config(args.config, args.pairs, earlier.settings if earlier else None)
    out, store = outputs.place_of(args.out or config.output_dir or f"runs/{config.name}")
    console = Console(markup=False, emoji=False, highlight=False, quiet=not first)
    if first and not args.check:
        outputs.check_out(out, args.overwrite, args.resume)
        if store:
            outputs.check_prefix(store, args.overwrite, args.resume)
    prepared = look(config, earlier, args.start_from)
    if args.check:
        return print_check(prepared, console)
    if first:
        outputs.check_space(out, prepared.folder, prepared.site, config.export, store)
    run, corpus = prepared.identity(), prepared.corpus
    over = first and args.resume and finished(out, run, store)
    distributed.agree(run | {"tokens": corpus and hashlib.sha256(corpus.tokens.tobytes()).hexdigest()})
    if distributed.from_first(over):
        return console.print(plain(f"{store or out}/ holds this run, finished: nothing to resume"))
    checkpointer = Checkpointer(open_run(out, run, args.resume), config.checkpoint_every)
    distributed.agree(last=True)
    for note in prepared.notes:
        log.warning(note)
    edits, site = len(prepared.data.requests), prepared.site
    console.print(f"{edits} edits, {len(site)} tensor(s) from {site[0]} on")

    with guarded(checkpointer):
        begin = time.monotonic()
        model = prepared.load()
        loaded = time.monotonic() - begin
        hooks: list[Hook] = [Metrics(name, checkpointer.folder / name) for name in config.report_to]
        hooks = [*hooks, *([Profile(args.profile)] if args.profile else [])] if first else []
        result = api.edit_prepared(model, prepared, checkpointer=checkpointer, hooks=hooks, show=True)
        if not first:
            return
        report = result.report
        report["seconds"]["load"] = loaded
        if earlier:
            report["streaming"] = streaming_report(earlier, report["batches"], args.start_from)
        with outputs.results(out, store) as folder:
            write(result, prepared, folder, store)
            keep(checkpointer, folder, [*config.report_to, *["steps"] * args.keep_checkpoint])
    print_report(report, result.predictions, console)
    if model.int8 and config.evaluate:
        console.print(plain(f"note: {int8_note(str(store or out), config)}"))
    written = {n.split("/")[0] for n in store.names(deep=True)} if store else {p.name for p in out.iterdir()}
    console.print(plain(f"written to {store or out}/: " + ", ".join(sorted(written))))


def look(config: Config, earlier: Earlier | None, start_from: str) -> Prepared:
    """The run, prepared; with an `earlier` one its edits too. Raises UserError."""
    if earlier is None or config.data_path is None:
        return prepare(config)
    data = extend(earlier, read_requests(config.data_path, config.num_edits, config.on_conflict))
    prepared = prepare(config, data=data)
    last = start_from == "last"
    return prepared.over(last_delta(earlier.folder, prepared.folder, prepared.site)) if last else prepared


def write(result: api.EditResult, prepared: Prepared, folder: Path, store: Remote | None) -> None:
    """All results, into the folder that becomes the run's; a model that belongs into a `store` goes there."""
    begin, export, new, base = time.monotonic(), prepared.config.export, result.delta.new, prepared.folder
    if "delta" in export:
        save_delta(result.delta, folder / "delta.safetensors")
    if "hf" in export:
        save_hf(base, new, (store or folder) / "hf", readme(base.path, result.delta.cards()))
    if "orbax" in export:
        orbax_export.save_orbax(base, new, folder / "orbax")
    write_jsonl(folder / "edits.jsonl", map(to_record, prepared.data.requests))
    write_jsonl(folder / "steps.jsonl", result.steps)
    write_jsonl(folder / "predictions.jsonl", result.predictions)
    result.report["seconds"]["export"] = time.monotonic() - begin
    write_json(folder / "report.json", result.report)


def keep(checkpointer: Checkpointer, folder: Path, names: Sequence[str]) -> None:
    """Of what was written during the run, which is in the folder that is replaced."""
    checkpointer.close()
    for name in filter(lambda name: (checkpointer.folder / name).exists(), names):
        shutil.copytree(checkpointer.folder / name, folder / ("checkpoint" if name == "steps" else name))


def print_check(prepared: Prepared, console: Console) -> None:
    """What a run would do: site, steps, tokens, memory, and the first training texts."""
    config, corpus, spec, folder = prepared.config, prepared.corpus, prepared.base.spec, prepared.folder
    assert corpus is not None
    step = step_of(corpus, config.batch_size, config.row_length, first_layer(spec, prepared.site))
    itemsize, int8 = frozen_dtype(folder, config.weights).itemsize, config.weights == "int8"
    need = estimate(spec, prepared.mesh.shape, itemsize, prepared.site, step, int8)
    size = sum(math.prod(folder.tensors[n].shape) for n in prepared.site)
    trained, longest = int(corpus.target_lengths.sum()), int(corpus.lengths.max())
    free = as_text(device_memory(prepared.mesh).free)
    lines = [
        f"site    {', '.join(prepared.site[:2])}: {len(prepared.site)} tensor(s), {size:,} parameters",
        f"texts   {len(corpus)} of {corpus.edits} edits: {len(corpus.tokens):,} tokens, {trained:,} of them "
        f"trained; {longest} in the longest",
        f"steps   {-(-corpus.edits // config.batch_size)} an epoch, {config.num_epochs} epochs at most",
        f"probes  {len(prepared.questions.probes) if prepared.questions else 'none'}",
        f"memory  {need} on each of {prepared.mesh.size} device(s); {free} are free",
        "first training texts, with [what is trained]:",
    ]
    for i in range(min(SHOWN, len(corpus))):
        tokens, start = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]], corpus.target_start[i]
        head, tail = (prepared.tokenizer.decode(part) for part in (tokens[:start], tokens[start:]))
        lines.append(f"  {head}[{tail}]")
    for line in [*lines, *(f"note: {note}" for note in prepared.notes)]:
        console.print(plain(line), soft_wrap=True)


def int8_note(out: str, config: Config) -> str:
    """What the figures of a run with int8 frozen weights are figures of, and how to measure its result."""
    model = [config.model_name_or_path, "--delta", f"{out}/delta.safetensors"]
    model = [f"{out}/hf"] if "hf" in config.export else model
    how = shlex.join(["locft", "evaluate", "--model", *model, "--data", str(config.data_path)])
    figures = "these figures are of the model with int8 weights, what was written has full precision"
    return f"{figures}; {how} measures that"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = new_parser("edit", __doc__, "CONFIG.yaml | key=value")
    add = parser.add_argument
    add("--out", type=path_or_url, help="folder or URL of the results (default: output_dir, runs/NAME)")
    add("--overwrite", action="store_true", help="replace an existing --out when the run is done")
    add("--resume", action="store_true", help="continue the interrupted run in --out, if there is one")
    add("--check", action="store_true", help="print what the run would do, and stop before loading the model")
    add("--keep-checkpoint", action="store_true", help="leave the last checkpoint in --out when done")
    add("--continue-from", type=path_or_url, metavar="OUT", help="add the edits to those of a finished run; "
        "its settings are the defaults, and all edits are trained together")  # fmt: skip
    add("--start-from", choices=("base", "last"), default="base", help="with --continue-from: train from "
        "the base weights (default), or from where that run ended")  # fmt: skip
    add("--profile", metavar="DIR", help="write a jax.profiler trace of a few steps")
    distributed.add_flags(parser)
    args = parse_config(parser, argv)
    if args.start_from == "last" and not args.continue_from:
        raise UserError("--start-from last: say which run it is with --continue-from OUT")
    return args

"""Edit with many settings and compare: `python -m locft_jax.sweep SWEEP.yaml [--set key=value ...]`.

The file is a config with a `grid` of values (locft_jax/sweeping/grid.py); every combination is an edit of the
unedited model. One line a run is kept, the tensors are not; at the end there are a table and a picture. What
was interrupted, or whose file got more runs, goes on with `--resume`.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from locft_jax import api, distributed
from locft_jax.data.capability import CapabilityItem, read_capability
from locft_jax.data.records import digest
from locft_jax.data.requests import EditData, read_requests
from locft_jax.editing.checkpointer import resumable
from locft_jax.editing.regularizers.preconditioner import check_preserve
from locft_jax.editing.regularizers.texts import encode_retained, retained_texts
from locft_jax.editing.run import check_fit, choose_site, encode_requests
from locft_jax.editing.trainer import NonFiniteLoss
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import make_probes, make_questions
from locft_jax.evaluation.report import plain
from locft_jax.io import outputs
from locft_jax.io.atomic import append_jsonl, whole_folder
from locft_jax.io.hf_folder import HFFolder, open_folder
from locft_jax.io.hf_load import load_opened, load_tokenizer
from locft_jax.logs import log
from locft_jax.model.model import Model
from locft_jax.model.sharding import make_mesh
from locft_jax.run_identity import describe_run
from locft_jax.studies.sweep.grid import Run, read_sweep
from locft_jax.studies.sweep.table import open_lines, print_results, write_results
from locft_jax.studies.tables import RATES, Line, describe_figures


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that has been looked at: what it edits with, and a digest of all that its result follows from."""

    run: Run
    checkpoint: HFFolder
    tokenizer: Any
    mesh: Mesh
    data: EditData
    capability: Sequence[CapabilityItem]
    digest: str
    notes: list[str]


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """sweep file -> runs, all of them looked at -> every run edited and measured -> table, picture."""
    first = distributed.first()  # the process that writes and prints
    runs = read_sweep(args.sweep, args.pairs, args.config)
    out = outputs.local_place(args.out or f"runs/{args.sweep.stem}")
    console = Console(markup=False, emoji=False, quiet=not first)

    # Everything that can be wrong is looked at before any weight is loaded.
    if first:
        outputs.check_out(out, args.overwrite, args.resume, proof="sweep.json")
    look = looker()
    jobs = [look(run) for run in runs]
    known = {job.run.name: job.digest for job in jobs}
    folder = out / "checkpoint"
    over = first and args.resume and finished(out, known)
    distributed.agree({"runs": list(known), **known})
    if distributed.from_first(over):
        return console.print(plain(f"{out}/ holds this sweep, finished: nothing to resume"))
    lines = open_lines(folder, known, args.resume) if first else {}
    distributed.agree(last=True)
    lines = distributed.from_first(lines)
    for note in dict.fromkeys(note for job in jobs for note in job.notes):
        log.warning(note)

    held: tuple[Any, Model] | None = None  # one model at a time
    waiting = [job for job in jobs if job.run.name not in lines]
    begin = time.monotonic()
    for number, job in enumerate(waiting):
        spent = time.monotonic() - begin
        left = f", about {spent / number * (len(waiting) - number) / 60:.0f} min left" if number else ""
        console.print(plain(f"run {number + 1} of {len(waiting)}{left}: {job.run.name}"))
        key = job.run.config.model_name_or_path, job.run.config.weights, tuple(job.mesh.shape.items())
        if held is None or held[0] != key:
            held = None
            held = key, load_opened(job.checkpoint, job.tokenizer, job.mesh, job.run.config.weights)
        with resumable(folder, lambda: f"the {len(lines)} runs finished" if lines else None):
            line = measure(held[1], job)
        if first:
            append_jsonl(folder / "runs.jsonl", line)
        lines[job.run.name] = line
        console.print(plain("  " + describe_figures(line)))
    if not first:
        return
    ordered = [lines[job.run.name] for job in jobs]
    with whole_folder(out) as place:
        facts = {
            "title": f"{args.sweep.stem}: {ordered[0]['edits']} edits in {Path(ordered[0]['model']).name}",
            "before": next((line["before"] for line in ordered if line["before"]), {}),
            "known": known,
        }
        result = write_results(place, ordered, facts)
    print_results(result, console)
    console.print(plain(f"written to {out}/: " + ", ".join(sorted(p.name for p in out.iterdir()))))


def looker() -> Callable[[Run], Job]:
    """Looks at one run after another; what they share is opened once. Raises UserError for anything that is
    wrong with a run, before any weight is loaded."""
    opened = functools.cache(open_folder)
    requests, items = functools.cache(read_requests), functools.cache(read_capability)
    tokenizers: dict[str, Any] = {}

    def look(run: Run) -> Job:
        config = run.config
        if config.data_path is None:
            raise UserError(
                "data_path: no edits given; set data_path to a file of edits (JSON, JSONL or CSV)"
            )
        data = requests(config.data_path, config.num_edits, config.on_conflict)
        capability = items(config.capability_data) if config.capability_data else []
        checkpoint = opened(config.model_name_or_path)
        if config.model_name_or_path not in tokenizers:
            tokenizers[config.model_name_or_path] = load_tokenizer(checkpoint)
        tokenizer, mesh = tokenizers[config.model_name_or_path], make_mesh(config.mesh)
        site = choose_site(checkpoint.spec, config)
        check_preserve(checkpoint.spec, site, config)
        retained = retained_texts(config, data.requests)
        encode_retained(tokenizer, checkpoint.spec, config, retained)
        corpus = encode_requests(tokenizer, data.requests, config, checkpoint.spec)
        probes = make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases)
        make_questions(tokenizer, probes, capability, checkpoint.spec, config.chat_template)
        notes = check_fit(checkpoint, dataclasses.replace(config, export=()), site, corpus, mesh)
        described = describe_run(config, data, capability, checkpoint, site, mesh, None, retained)
        described.pop("versions")
        return Job(run, checkpoint, tokenizer, mesh, data, capability, digest([described]), notes)

    return look


def measure(model: Model, job: Job) -> Line:
    """The job's edit of the model, and what it came to: a line of runs.jsonl. Figures are None where the
    loss was not finite."""
    config, begin = job.run.config, time.monotonic()
    line: dict[str, Any] = {
        "name": job.run.name,
        "run": job.digest,
        "settings": job.run.settings,
        "model": config.model_name_or_path,
        "edits": len(job.data.requests),
    }
    try:
        report = api.edit(model, job.data, config, job.capability, show=True).report
    except NonFiniteLoss as e:
        nothing = dict.fromkeys((*RATES, "steps", "epochs", "loss", "edit_seconds"))
        return {**line, **nothing, "before": {}, "stopped": str(e), "dynamics": [], "seconds": None}
    return {
        **line,
        **{key: report["after"][key] for key in RATES},
        "before": report["before"],
        "steps": report["steps_run"],
        "epochs": report["epochs_run"],
        "loss": report["epoch_losses"][-1],
        "stopped": report["stopped"],
        "dynamics": report["dynamics"],
        "edit_seconds": report["seconds"]["edit"],
        "seconds": time.monotonic() - begin,
    }


def finished(out: Path, known: Mapping[str, str]) -> bool:
    """Whether `out` holds the results of these very runs, and nothing to go on from."""
    if (out / "checkpoint").exists():
        return False
    try:
        return json.loads((out / "sweep.json").read_text(encoding="utf-8"))["known"] == known
    except (OSError, ValueError, KeyError, TypeError):
        return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides."""
    parser = argparse.ArgumentParser(prog="python -m locft_jax.sweep", description=__doc__)
    add = parser.add_argument
    add("sweep", type=Path, metavar="SWEEP.yaml", help="keys of a config, a grid of values, further runs")
    add(
        "--set",
        action="append",
        default=[],
        nargs="+",
        metavar="key=value",
        help="override a key in all runs",
    )
    add("--config", metavar="FILE|demo", help="in place of the `config` that the sweep file names")
    add("--out", help="folder for the results (default: runs/NAME)")
    add("--overwrite", action="store_true", help="replace an existing --out when the sweep is done")
    add("--resume", action="store_true", help="keep the runs that are finished in --out")
    distributed.add_flags(parser)
    args = parser.parse_args(argv)
    args.pairs = [pair for group in args.set for pair in group]
    return args


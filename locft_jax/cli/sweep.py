"""Edit with many settings and compare. The file is a config with a `grid` of values; every combination is an
edit of the unedited model. One line a run is kept, the tensors are not; at the end there are a table and
pictures. What was interrupted, or whose file got more runs, continues with --resume."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from locft_jax import api, distributed
from locft_jax.cli.main import new_parser, parse_config
from locft_jax.data.records import digest
from locft_jax.editing.trainer import NonFiniteLoss
from locft_jax.errors import UserError
from locft_jax.evaluation.report import plain
from locft_jax.io import outputs
from locft_jax.io.atomic import kept_jsonl, read_json, whole_folder, write_json
from locft_jax.logs import log
from locft_jax.model.model import Model
from locft_jax.prepare import Opened, Prepared, prepare
from locft_jax.studies.sweep import Run, print_results, read_sweep, write_results
from locft_jax.studies.tables import RATES, Line, Lines, describe_figures


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that has been looked at."""

    run: Run
    prepared: Prepared

    @functools.cached_property
    def digest(self) -> str:
        """Of all that its result follows from."""
        identity = self.prepared.identity()
        return digest([{key: value for key, value in identity.items() if key != "versions"}])


def main(argv: list[str] | None = None) -> None:
    """The command, in one process or as one of several."""
    args = parse(argv)
    with distributed.joined(args):
        carry_out(args)


def carry_out(args: argparse.Namespace) -> None:
    """sweep file -> runs, all of them prepared -> every run edited and measured -> table, pictures."""
    first = distributed.first()  # the process that writes and prints
    sweep = Path(args.config)
    runs = read_sweep(sweep, args.pairs, args.base)
    out = outputs.local_place(args.out or f"runs/{sweep.stem}")
    file = out / "checkpoint" / "runs.jsonl"
    console = Console(markup=False, emoji=False, highlight=False, quiet=not first)
    if first:
        outputs.check_out(out, args.overwrite, args.resume, proof="sweep.json")
    opened = Opened()
    jobs = [Job(run, prepare(run.config, opened=opened)) for run in runs]
    known = {job.run.name: job.digest for job in jobs}
    result = read_json(out / "sweep.json") if first and args.resume else None
    over = isinstance(result, dict) and result.get("known") == known and not file.parent.exists()
    distributed.agree({"runs": list(known), **known})
    if distributed.from_first(over):
        return console.print(plain(f"{out}/ holds this sweep, finished: nothing to resume"))
    if first:
        check_lines(file, known, args.resume)
    lines = Lines(file)
    for note in dict.fromkeys(note for job in jobs for note in job.prepared.notes):
        log.warning(note)
    with lines.resumable("runs finished so far"):
        measure_jobs(jobs, lines, console)
    if not first:
        return
    by_name = {line["name"]: line for line in lines}
    ordered = [by_name[name] for name in known]
    facts = {
        "title": f"{sweep.stem}: {ordered[0]['edits']} edits in {Path(ordered[0]['model']).name}",
        "before": next((line["before"] for line in ordered if line["before"]), {}),
        "known": known,
    }
    with whole_folder(out) as folder:
        result = write_results(folder, ordered, facts)
    print_results(result, console)
    console.print(plain(f"written to {out}/: " + ", ".join(sorted(p.name for p in out.iterdir()))))


def check_lines(file: Path, known: Mapping[str, str], resume: bool) -> None:
    """Remove the lines of earlier runs, or with `resume` look at them; keep what each run of the sweep is
    (`known`: name -> digest). Raises UserError for a run that the sweep does not have, or has otherwise."""
    if not resume:
        file.unlink(missing_ok=True)
    for line in kept_jsonl(file):
        name = line["name"]
        if known.get(name) != line["run"]:
            what = "with other settings, data or model" if name in known else "which is not in this sweep"
            raise UserError(
                f"--resume: {file.parent.parent} holds the run {name}, {what}; use the file and data of that "
                "sweep (further runs may be added), or another --out"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file.parent / "run.json", known)


def measure_jobs(jobs: Sequence[Job], lines: Lines, console: Console) -> None:
    """Add a line for each of the jobs that has none yet. One model is held at a time."""
    begin, held, done = time.monotonic(), dict[Any, Model](), {line["name"] for line in lines}
    jobs = [job for job in jobs if job.run.name not in done]
    for number, job in enumerate(jobs):
        spent = time.monotonic() - begin
        left = f", about {spent / number * (len(jobs) - number) / 60:.0f} min left" if number else ""
        console.print(plain(f"run {number + 1} of {len(jobs)}{left}: {job.run.name}"))
        config = job.run.config
        key = config.model_name_or_path, config.weights, tuple(job.prepared.mesh.shape.items())
        if key not in held:
            held.clear()
            held[key] = job.prepared.load()
        line = lines.keep(measure(held[key], job))
        console.print(plain("  " + describe_figures(line)))


def measure(model: Model, job: Job) -> Line:
    """The job's edit of the model, and what it came to: a line of runs.jsonl. Figures are None where the
    loss was not finite."""
    begin = time.monotonic()
    line: dict[str, Any] = {
        "name": job.run.name,
        "run": job.digest,
        "settings": job.run.settings,
        "model": job.run.config.model_name_or_path,
        "edits": len(job.prepared.data.requests),
    }
    try:
        report = api.edit_prepared(model, job.prepared, show=True).report
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `pairs` are its key=value overrides, of all runs."""
    parser = new_parser("sweep", __doc__, "SWEEP.yaml | key=value")
    add = parser.add_argument
    add("--config", dest="base", metavar="FILE|demo", help="in place of the `config` that the file names")
    add("--out", help="folder for the results (default: runs/NAME)")
    add("--overwrite", action="store_true", help="replace an existing --out when the sweep is done")
    add("--resume", action="store_true", help="keep the runs that are finished in --out")
    distributed.add_flags(parser)
    args = parse_config(parser, argv)
    if args.config is None:
        raise UserError("sweep: no sweep file given; see configs/paper/ for some")
    return args

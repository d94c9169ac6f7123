"""The table of measured sites: kept line by line while it grows, written as a whole when it is done.

checkpoint/run.json      what the run is: another run must not go on from here
checkpoint/before.json   the answers before any edit
checkpoint/sites.jsonl   one line a site
checkpoint/compiled/     compiled programs (compiled.py)
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from locft_jax import distributed
from locft_jax.editing.checkpointer import open_run, remove_unless_saved, resumable
from locft_jax.evaluation.probes import Answers
from locft_jax.evaluation.report import plain
from locft_jax.io.atomic import append_jsonl, kept_jsonl, read_json, write_json
from locft_jax.io.outputs import saved_something
from locft_jax.run_identity import check_same
from locft_jax.studies.locate.places import Place
from locft_jax.studies.locate.rule import ranked, recommend
from locft_jax.studies.tables import Line, percent, print_table, worth_showing, write_table


class Table:
    """The lines measured so far, in memory and on the disk."""

    def __init__(self, folder: Path, lines: Sequence[Line]) -> None:
        self.folder, self.lines = folder, list(lines)
        self.seen = {(line["layer"], line["module"]) for line in lines}

    def holds(self, place: Place) -> bool:
        """Whether the place has been measured."""
        return place.key in self.seen

    def add(self, line: Line) -> Line:
        """One more line; on the disk when this returns."""
        self.lines.append(line)
        self.seen.add((line["layer"], line["module"]))
        if distributed.first():
            append_jsonl(self.folder / "sites.jsonl", line)
        return line

    def keep_before(self, before: Answers) -> None:
        """Keep the answers before any edit."""
        if distributed.first():
            write_json(self.folder / "before.json", dataclasses.asdict(before))

    def before(self) -> Answers | None:
        """What `keep_before` kept, or None."""
        path = self.folder / "before.json"
        found = distributed.from_first(read_json(path) if distributed.first() else None)
        with suppress(TypeError):  # there are none, or they are of version 0.1
            return Answers(**found)
        return None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a run: SIGTERM and Ctrl-C say how to resume; a run that has saved nothing leaves nothing."""

        def kept() -> str | None:
            return f"the {len(self.lines)} sites measured so far" if saved_something(self.folder) else None

        try:
            with resumable(self.folder, kept):
                yield
        finally:
            if distributed.first():
                remove_unless_saved(self.folder)


def open_table(out: Path, run: Mapping[str, Any], resume: bool) -> Table:
    """The table of a run in `out`: its lines so far if it is to `resume`, else none. Raises UserError naming
    what differs when they are another run's."""
    folder = open_run(out, run, resume)
    distributed.agree(last=True)
    lines = kept_jsonl(folder / "sites.jsonl") if distributed.first() else []
    return Table(folder, distributed.from_first(lines))


def finished(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether `out` holds this run's results and nothing to go on from. Raises UserError where the results
    are those of another run."""
    found = read_json(out / "sites.json")
    if saved_something(out / "checkpoint") or not isinstance(found, dict) or "run" not in found:
        return False
    check_same(found["run"], run, out)
    return True


def write_results(
    folder: Path, lines: Sequence[Line], facts: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    """sites.csv, sites.json, curves.png, heatmap.png; what sites.json holds."""
    from locft_jax.studies import figures

    names = list(dict.fromkeys(line["module"] for line in lines))
    lines = sorted(lines, key=lambda line: (line["layer"], names.index(line["module"])))
    top = recommend(lines, facts["before"])
    result = {**facts, "recommendation": top, "sites": lines, "run": dict(run)}
    seconds = [{f"seconds_{k}": v for k, v in line["seconds"].items()} for line in lines]
    plain_lines = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    write_table(folder, "sites", result, [a | b for a, b in zip(plain_lines, seconds, strict=True)])
    title = f"{facts['edits']} edits in {Path(str(facts['model'])).name}"
    figures.save(figures.draw_curves(lines, facts["before"], title), folder / "curves.png")
    heat = figures.draw_heat_maps(lines, (top["layer"], top["module"]), f"{title}; framed: the site to use")
    figures.save(heat, folder / "heatmap.png")
    return result


def print_results(result: Mapping[str, Any], console: Console, count: int = 5) -> None:
    """The first sites by the rule, and the recommendation with the lines to paste."""
    keys = worth_showing(result["sites"])
    first = {**result["before"], "module": "unedited", "layer": "-"}
    rows = [
        {"module": line["module"], "layer": str(line["layer"])}
        | {key.replace("_", " "): percent(line[key]) for key in keys}
        for line in [first, *ranked(result["sites"], count)]
    ]
    print_table(f"the best of {len(result['sites'])} sites, %", rows, console)
    console.print(plain(f"Where to edit: {result['recommendation']['words']}"))
    console.print(f"\n{result['recommendation']['config']}\n")

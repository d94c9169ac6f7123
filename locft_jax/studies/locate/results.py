"""What locate leaves: sites.csv, sites.json, curves.png, heatmap.png, and the words on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from locft_jax.evaluation.report import plain
from locft_jax.io.atomic import read_json
from locft_jax.io.outputs import saved_something
from locft_jax.run_identity import check_same
from locft_jax.studies.rule import ranked, recommend_site
from locft_jax.studies.tables import Line, percent, print_table, worth_showing, write_table


def finished(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether `out` holds this run's results and nothing to resume from. Raises UserError where the results
    are those of another run."""
    found = read_json(out / "sites.json")
    if saved_something(out / "checkpoint") or not isinstance(found, dict) or "run" not in found:
        return False
    check_same(found["run"], run, out)
    return True


def write_results(
    folder: Path, lines: Sequence[Line], facts: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    """All results; what sites.json holds."""
    from locft_jax.studies import figures  # matplotlib and pandas come with it

    names = list(dict.fromkeys(line["module"] for line in lines))
    lines = sorted(lines, key=lambda line: (line["layer"], names.index(line["module"])))
    top = recommend_site(lines, facts["before"])
    result = {**facts, "recommendation": top, "sites": lines, "run": dict(run)}
    spent = [{f"seconds_{k}": v for k, v in line["seconds"].items()} for line in lines]
    rows = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    write_table(folder, "sites", result, [row | own for row, own in zip(rows, spent, strict=True)])
    title = f"{facts['edits']} edits in {Path(str(facts['model'])).name}"
    figures.draw_curves(lines, facts["before"], title).savefig(folder / "curves.png")
    heat = figures.draw_heat_maps(lines, (top["layer"], top["module"]), f"{title}; framed: the site to use")
    heat.savefig(folder / "heatmap.png")
    return result


def print_results(result: Mapping[str, Any], console: Console, count: int = 5) -> None:
    """The first sites by the rule, and the recommendation with the lines to paste."""
    shown, top = worth_showing(result["sites"]), result["recommendation"]
    first = {**result["before"], "module": "unedited", "layer": "-"}
    rows = [
        {"module": line["module"], "layer": str(line["layer"])}
        | {key.replace("_", " "): percent(line[key]) for key in shown}
        for line in [first, *ranked(result["sites"], count)]
    ]
    print_table(f"the best of {len(result['sites'])} sites, %", rows, console)
    console.print(plain(f"Where to edit: {top['words']}"))
    console.print(f"\n{top['config']}\n")

"""Edits that arrive over time: batches of demo edits, each added with `--continue-from` to those before.

    python benchmarks/streaming.py [--batches 10] [--size 50] [--start-from base|last] [--small]

Every arrival retrains the cumulative set breadth-first. Prints the reliability of every earlier batch
after each arrival (also in the last run's report.json), and one JSON line last.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.config import DEMO_CONFIG
from locft_jax.demo.world import make_edits, make_world


def stream(batches: int, size: int, start: str, place: Path, more: list[str]) -> list[dict[str, Any]]:
    """The reports of runs 1 .. batches, written under `place`."""
    edits = make_edits(make_world(), batches * size)
    reports: list[dict[str, Any]] = []
    for i in range(batches):
        data, out = place / f"arrival-{i}.json", place / f"run-{i}"
        data.write_text(json.dumps(edits[i * size : (i + 1) * size]))
        before = ["--continue-from", str(place / f"run-{i - 1}"), "--start-from", start] if i else []
        line = [str(DEMO_CONFIG), "--out", str(out), *before]
        if run_command(edit, [*line, "--set", f"data_path={data}", "export=[delta]", *more]):
            sys.exit(1)
        reports.append(json.loads((out / "report.json").read_text()))
    return reports


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--size", type=int, default=50, help="edits a batch")
    parser.add_argument("--start-from", choices=("base", "last"), default="base")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    more = ["num_epochs=2", "evaluate=true"] if args.small else []
    batches, size = (2, 3) if args.small else (args.batches, args.size)
    with tempfile.TemporaryDirectory() as place:
        reports = stream(batches, size, args.start_from, Path(place), more)
    curve = reports[-1]["streaming"]["curve"]
    print("\nreliability of each batch (columns) after each arrival (rows), in %")
    for row in curve:
        print(" ".join(f"{100 * rate:6.1f}" for rate in row))
    after = [r["after"] for r in reports]
    result = {
        "benchmark": "streaming",
        "batches": batches,
        "size": size,
        "start_from": args.start_from,
        "lowest_of_an_earlier_batch": min(rate for row in curve[1:] for rate in row[:-1]),
        "lowest_of_any_batch": min(rate for row in curve for rate in row),
        "generalization": [a["generalization"] for a in after],
        "locality_agreement": [a["locality_agreement"] for a in after],
        "capability": [a["capability"] for a in after],
        "epochs": [r["epochs_run"] for r in reports],
        "seconds_edit": [r["seconds"]["edit"] for r in reports],
        "curve": curve,
    }
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()

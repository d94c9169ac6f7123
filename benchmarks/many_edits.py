"""1,000, 10,000 and 100,000 edits, end to end: seconds, tokens/s, peak host and device memory.

    python benchmarks/many_edits.py                                   made-up facts, the demo model
    python benchmarks/many_edits.py --data FILE --counts 10000 100000
    python benchmarks/many_edits.py --small                           a smoke run in seconds

Every count is a `python -m locft_jax.edit` of its own, with evaluation on `--eval-sample` probes of
each kind before and after. Without `--data` the edits are invented: every subject another name.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, hardware
from locft_jax.config import DEMO_FOLDER

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = (
    "ba ben bor cal cor da del dor el fen fi gal gor ha hel il jas ka kel lam lor ma mir na nor "
    "o or pel per qui ra ren rok sa sel tam tor u val var wen wil xan yor za zel"
).split()
RELATIONS = {
    "{} was born in": "The birthplace of {} is",
    "{} is by profession a": "Profession of {}:",
    "The favourite colour of {} is": "{} likes best the colour",
    "{} works for": "The employer of {} is",
}
# The command, with the device's peak memory (null where the backend keeps no count) as last line.
CHILD = """
import json, sys
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main
status = run_command(main)
if status == 0:
    import jax
    print(json.dumps((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")))
sys.exit(status)
"""


def invented(number: int) -> str:
    """A name of its own for every number below 46**4 (about 4 million)."""
    number = number * 1_000_003 % len(SYLLABLES) ** 4  # a bijection: the factor and 46 are coprime
    parts = []
    for _ in range(4):
        number, digit = divmod(number, len(SYLLABLES))
        parts.append(SYLLABLES[digit])
    return f"{parts[0]}{parts[1]} {parts[2]}{parts[3]}".title()


def write_edits(path: Path, count: int) -> None:
    """`count` edits of invented subjects, each with a rephrase and a question about someone else."""
    relations = list(RELATIONS.items())
    with path.open("w", encoding="utf-8") as f:
        for i in range(count):
            prompt, rephrase = relations[i % len(relations)]
            edit = {
                "prompt": prompt.format(invented(i)),
                "target_new": invented(2_000_000 + i * i % 997),
                "rephrase_prompt": rephrase.format(invented(i)),
                "locality_prompt": prompt.format(invented(3_000_000 + i)),
            }
            f.write(json.dumps(edit) + "\n")


def run(
    model: str, data: str, count: int, epochs: int, sample: int, settings: Sequence[str]
) -> dict[str, Any]:
    """One `locft_jax.edit` in a process of its own. Raises SystemExit where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        values = {
            "model_name_or_path": model,
            "data_path": data,
            "num_edits": count,
            "num_epochs": epochs,
            "eval_sample": sample,
            "loss_floor": 0,  # every epoch is run and every step is made, whatever the model learns
        }
        pairs = [f"{k}={v}" for k, v in values.items()] + list(settings)
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, "--set", *pairs, "--out", str(out)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        assert child.stdout is not None
        said = child.stdout.read().decode()
        _, status, usage = os.wait4(child.pid, 0)  # this child's own peak: RUSAGE_CHILDREN keeps the largest
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begin
        if child.returncode:
            raise SystemExit(f"{count} edits: locft_jax.edit ended with status {child.returncode}\n{said}")
        report = json.loads((out / "report.json").read_text())
    device = json.loads(said.splitlines()[-1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return {
        "edits": report["edits"],
        "wall_seconds": wall,
        "seconds": report["seconds"],
        "edit_seconds_per_1000": 1000 * report["seconds_per_edit"],
        "tokens_per_second": report["tokens_per_second"],
        "activation_cache": report["activation_cache"],
        "peak_host_gib": usage.ru_maxrss * unit / 2**30,
        "peak_device_gib": None if device is None else device / 2**30,
        "reliability": report["after"]["reliability"],
    }


def off_linear(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """How far the last count's seconds are off those of the one before, scaled by the number of edits
    (0.1: 10 % too slow). The wall includes start-up and evaluation, which do not grow with the edits."""
    if len(rows) < 2:
        return None
    a, b = rows[-2], rows[-1]
    grown = b["edits"] / a["edits"]
    return {
        "edit": b["seconds"]["edit"] / a["seconds"]["edit"] / grown - 1,
        "wall": b["wall_seconds"] / a["wall_seconds"] / grown - 1,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line a count, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny random model, for a smoke run")
    parser.add_argument("--data", help="file of edits (default: invented ones)")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", default=str(DEMO_FOLDER / "model"))
    parser.add_argument("--eval-sample", type=int, default=2000, help="probes of each kind")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="change the config")
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.small:
            from benchmarks.tiny import tiny_model

            args.model = str(tiny_model(Path(folder) / "model"))
            args.counts, args.epochs, args.eval_sample = [50, 200], 2, 8
        data = args.data
        if data is None:
            data = f"{folder}/edits.jsonl"
            write_edits(Path(data), max(args.counts))
        for count in args.counts:
            row = run(args.model, data, count, args.epochs, args.eval_sample, args.set)
            rows.append(row)
            device = row["peak_device_gib"]
            print(
                f"{row['edits']} edits: {row['edit_seconds_per_1000']:.2f} s per 1,000 edits "
                f"({row['seconds']['edit']:.1f} s of {row['wall_seconds']:.1f} s), "
                f"{row['tokens_per_second']:.0f} tokens/s, peak {row['peak_host_gib']:.2f} GiB on the host"
                + ("" if device is None else f", {device:.2f} GiB on the device"),
                flush=True,
            )
    linear = off_linear(rows)
    if linear is not None:
        print(
            f"from {rows[-2]['edits']} to {rows[-1]['edits']} edits: {100 * linear['edit']:+.1f} % off "
            f"linear (the whole run {100 * linear['wall']:+.1f} %)"
        )
    finish(
        {"benchmark": "many_edits", "epochs": args.epochs, "eval_sample": args.eval_sample,
         "hardware": hardware(), "off_linear": linear, "rows": rows},
        args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()

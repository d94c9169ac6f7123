"""Breadth- and depth-first, batch 1 and mini-batches, and FT-L, on the demo model: the paper's 2 x 2.

    python benchmarks/pipelines.py [--edits 100] [--batch 10] [--steps 25] [--lr 5e-4] [--small]

Prints a table of rates after each run, and one JSON line last.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, hardware
from locft_jax.commands import run_command
from locft_jax.config import DEMO_CONFIG
from locft_jax.edit import main as edit

RATES = ("reliability", "generalization", "locality_agreement", "capability")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--batch", type=int, default=10, help="edits of a mini-batch")
    parser.add_argument("--steps", type=int, default=25, help="epochs, or steps on a mini-batch")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    edits, batch, steps = (6, 3, 2) if args.small else (args.edits, args.batch, args.steps)
    cells = [(p, b, "ft-m") for b in (1, batch) for p in ("depth", "breadth")]
    cells += [(p, 1, "ft-l") for p in ("depth", "breadth")]
    cells = [("depth", batch, "ft-m"), ("breadth", batch, "ft-l")] if args.small else cells
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for i, (pipeline, size, method) in enumerate(cells):
            out = Path(place) / str(i)
            pairs = [f"num_edits={edits}", f"batch_size={size}", f"num_steps={steps}", f"lr={args.lr}"]
            pairs += [f"pipeline={pipeline}", f"method={method}", f"seed={args.seed}", "export=[delta]"]
            pairs += ["eval_sample=20"] if args.small else ["eval_sample=400"]
            if run_command(edit, [str(DEMO_CONFIG), "--out", str(out), "--set", *pairs]):
                sys.exit(1)
            report = json.loads((out / "report.json").read_text())
            row = {"pipeline": pipeline, "batch": size, "method": method, "steps": report["steps_run"]}
            rows.append(row | {k: report["after"][k] for k in RATES})
    print(f"\n{'':24}" + " ".join(f"{k[:14]:>14}" for k in ("steps", *RATES)))
    for row in rows:
        rates = " ".join(f"{100 * row[k]:14.1f}" for k in RATES)
        print(f"{row['pipeline']:8} {row['batch']:5} {row['method']:8} {row['steps']:14} {rates}")
    result = {"benchmark": "pipelines", "edits": edits, "num_steps": steps, "lr": args.lr, "seed": args.seed}
    finish({**result, "hardware": hardware(), "rows": rows}, args.out)


if __name__ == "__main__":
    main()

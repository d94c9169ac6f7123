"""What preserving edits cost and keep: demo edits with plain LocFT-BF and with `preserve`, side by side.

    python benchmarks/preserve.py [--seeds 0 1] [--lr 1e-3 2e-3] [--strength 3 10]
        [--source templates] [--small]

Every seed is another sample of facts to edit. Prints each run's figures, their mean and spread (standard
deviation), and one JSON line last.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import finish, hardware

from locft_jax import Config, edit, load_model
from locft_jax.config import DEMO_FOLDER
from locft_jax.data.capability import read_capability
from locft_jax.demo.world import make_edits, make_world

FIGURES = ("reliability", "generalization", "lost", "capability")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3], help="rates of every method")
    parser.add_argument("--strength", type=float, nargs="+", default=[10.0], help="of preserve=soft")
    parser.add_argument("--source", nargs="+", default=["model", "templates"], help="or files of texts")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    if args.small:
        args.seeds, args.lr, args.source, args.edits = [0], [1e-3], ["templates"], 5
    methods: list[dict[str, Any]] = [{"preserve": "none"}]
    methods += [
        {"preserve": "soft", "preserve_data": data, "preserve_strength": strength}
        for data in args.source
        for strength in args.strength
    ]
    model, skills = load_model(str(DEMO_FOLDER / "model")), read_capability(str(DEMO_FOLDER / "skills.jsonl"))
    skills = skills[:20] if args.small else skills
    rows = []
    for lr, method in [(lr, method) for lr in args.lr for method in methods]:
        runs = []
        for seed in args.seeds:
            config = Config(layer=6, lr=lr, batch_size=200, num_steps=2 if args.small else 200, seed=seed,
                            eval_sample=20 if args.small else None, **method)  # fmt: skip
            report = edit(model, make_edits(make_world(), args.edits, seed), config, skills).report
            after = {**report["after"], "lost": 1 - report["after"]["locality_agreement"]}
            runs.append({k: after[k] for k in FIGURES} | {"seconds": report["seconds"]["edit"]})
        row: dict[str, Any] = {"lr": lr, **method, "runs": runs}
        row["mean"] = {k: statistics.mean(r[k] for r in runs) for k in FIGURES}
        row["spread"] = {k: statistics.pstdev(r[k] for r in runs) for k in FIGURES}
        rows.append(row)
        told = "  ".join(f"{k} {row['mean'][k]:.3f} ± {row['spread'][k]:.3f}" for k in FIGURES)
        print(f"lr {lr:g} {' '.join(str(v) for v in method.values()):20} {told}", flush=True)
    finish({"benchmark": "preserve", "hardware": hardware(), "seeds": args.seeds, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

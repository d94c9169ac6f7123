"""Random texts before the prompts of the training (`augment_prefixes`), asked with other random texts there.

    python benchmarks/prefixed_probes.py [--prefixes 0 1 5] [--edits 100] [--seeds 0 1 2] [--small]

CounterFact's paraphrases begin with an unrelated text (the paper's Table 7); those of the demo do not. Here
every demo edit is also asked in its own words after such a text: one that the model writes with another seed
and that no training saw. Prints a table, and one JSON line last.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import finish, hardware

from locft_jax import Config, edit, load_model
from locft_jax.config import DEMO_FOLDER
from locft_jax.data.capability import read_capability
from locft_jax.demo.world import make_edits, make_world
from locft_jax.editing.augment import written_prefixes

FIGURES = ("reliability", "prefixed", "generalization", "locality_agreement", "capability")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefixes", type=int, nargs="+", default=[0, 1, 5], help="texts an edit")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    if args.small:
        args.prefixes, args.edits, args.seeds = [0, 1], 4, [0]
    model, skills = load_model(str(DEMO_FOLDER / "model")), read_capability(str(DEMO_FOLDER / "skills.jsonl"))
    skills = skills[:5] if args.small else skills
    rows = []
    for count in args.prefixes:
        runs = [one_run(model, skills, args.edits, count, seed, args.small) for seed in args.seeds]
        mean = {key: statistics.mean(run[key] for run in runs) for key in FIGURES}
        rows.append({"augment_prefixes": count, "runs": runs, "mean": mean})
        line = "  ".join(f"{key} {100 * mean[key]:.1f}" for key in FIGURES)
        print(f"{count} texts an edit  {line}", flush=True)
    result = {"benchmark": "prefixed_probes", "hardware": hardware(), "edits": args.edits, "rows": rows}
    finish(result, args.out)


def one_run(model: Any, skills: Any, edits: int, count: int, seed: int, small: bool) -> dict[str, float]:
    """Figures 0-1 of one edit of the demo model; `prefixed`: of the edits' prompts after an unseen text."""
    config = Config(layer=6, learning_rate=2e-3, batch_size=200, num_epochs=2 if small else 200, seed=seed,
                    augment_prefixes=count)  # fmt: skip
    seen = set(written_prefixes(model, config))
    other = dataclasses.replace(config, augment_prefixes=5, seed=1000 + seed)
    texts = [text for text in written_prefixes(model, other) if text not in seen]
    requests = make_edits(make_world(), edits, seed)
    for i, request in enumerate(requests):
        if small:
            del request["locality_probes"][2:]
        request["rephrase_prompts"].insert(0, f"{texts[i % len(texts)]} {request['prompt']}")
    result = edit(model, requests, config, skills)
    asked = [line for line in result.predictions if line["probe"] == "generalization"]
    first = {(str(r["case_id"]), r["rephrase_prompts"][0]) for r in requests}
    prefixed = [line["correct"] for line in asked if (line["case"], line["prompt"]) in first]
    rest = [line["correct"] for line in asked if (line["case"], line["prompt"]) not in first]
    return {
        **{key: result.report["after"][key] for key in FIGURES if key in result.report["after"]},
        "prefixed": statistics.mean(prefixed),
        "generalization": statistics.mean(rest),
    }


if __name__ == "__main__":
    main()

"""What an edit costs the model's own language: perplexity of texts that the model wrote before it was edited,
plain LocFT-BF and every way to preserve side by side, at equal edits.

    python benchmarks/perplexity.py [--model stories260K --data zsre_3k.json] [--edits 50] [--seeds 0 1 2]
        [--lr 2e-3] [--methods plain kl-model ...] [--small]

The texts are sampled from the unedited model with a seed of their own, not that of the texts that preserving
samples. Prints mean and spread (standard deviation), and one JSON line last.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, hardware

from locft_jax import Config, edit, load_model
from locft_jax.config import DEMO_FOLDER
from locft_jax.data.packing import Corpus, corpus_from_lists
from locft_jax.data.requests import read_requests
from locft_jax.editing.regularizers.texts import sample_model
from locft_jax.evaluation.verify import score_corpus
from locft_jax.model.model import Model

FIGURES = ("reliability", "generalization", "locality_agreement", "perplexity", "steps", "seconds")
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft-model": {"preserve": "soft", "preserve_strength": 3.0, "preserve_data": "model"},
    "kl-model": {"preserve_kl": 1.0, "preserve_data": "model"},
    "soft-kl-model": {
        "preserve": "soft",
        "preserve_strength": 3.0,
        "preserve_kl": 1.0,
        "preserve_data": "model",
    },
}


def perplexity(model: Model, corpus: Corpus) -> float:
    """exp of the mean negative log-likelihood of every token after the first."""
    logs = [logprob for _, _, logprob in score_corpus(model, corpus, 128)]
    return float(np.exp(-np.concatenate(logs).mean()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(DEMO_FOLDER / "model"))
    parser.add_argument("--data", default=str(DEMO_FOLDER / "edits.jsonl"))
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3], help="rates of every method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--texts", type=int, default=512, help="sampled to measure perplexity")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    steps = 2 if args.small else 60
    if args.small:
        args.edits, args.seeds, args.texts, args.methods = 3, [0], 8, ["plain"]
    model, data = load_model(args.model), read_requests(args.data, args.edits)
    ids = [text for text in sample_model(model, 12345, args.texts, 64) if len(text) > 1]
    corpus = corpus_from_lists(ids, np.ones(len(ids)))
    before = perplexity(model, corpus)
    print(f"perplexity before the edit: {before:.3f} ({len(corpus)} texts)")
    rows = []
    for name, lr in [(name, lr) for name in args.methods for lr in args.lr]:
        runs = []
        for seed in args.seeds:
            config = Config(layer=2, rewrite_module="model.layers.{}", batch_size=25, num_epochs=steps,
                            learning_rate=lr, row_length=128, seed=seed, eval_sample=500,
                            **METHODS[name])  # fmt: skip
            result = edit(model, data, config)
            report = result.report
            runs.append({
                **{key: report["after"][key] for key in FIGURES[:3]},
                "perplexity": perplexity(result.edited, corpus),
                "steps": report["steps_run"],
                "seconds": report["seconds"]["edit"],
            })  # fmt: skip
        mean = {key: statistics.mean(run[key] for run in runs) for key in FIGURES}
        spread = {key: statistics.pstdev(run[key] for run in runs) for key in FIGURES}
        rows.append({"method": name, "lr": lr, "runs": runs, "mean": mean, "spread": spread})
        line = "  ".join(f"{key} {mean[key]:.3f} ± {spread[key]:.3f}" for key in FIGURES)
        print(f"{name:14} lr {lr:g}  {line}", flush=True)
    result = {"benchmark": "perplexity", "hardware": hardware(), "edits": args.edits, "before": before}
    finish({**result, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

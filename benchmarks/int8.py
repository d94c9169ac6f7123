"""What int8 frozen weights cost: the same edits learned on float and on int8 weights, both measured on what
they export, in full precision.

    python benchmarks/int8.py [CONFIG.yaml] [--set key=value ...] [--seeds 0 1 2] [--small]

Takes what the edit command takes; without a config and a model it is the demo. Prints how far int8 moves
the logits of the unedited model (on the texts of the edits), every figure side by side (means over the
seeds, which order the edits, and by how much the float runs of two seeds differ: their standard deviation),
a note where the exported models differ by more than 2 points, and one JSON line last.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import finish, hardware

from locft_jax import edit, evaluate, load_model
from locft_jax.config import load_config
from locft_jax.data.capability import read_capability
from locft_jax.data.packing import Corpus
from locft_jax.data.requests import read_requests
from locft_jax.editing.run import encode_requests
from locft_jax.evaluation.scoring import matches
from locft_jax.io.hf_save import save_hf
from locft_jax.model import decoder
from locft_jax.model.model import Model

NEAR = 0.02  # what counts as the same rate
SMALL = ["num_edits=4", "num_epochs=2", "eval_sample=3", "capability_data=[]"]


def logit_error(exact: Model, int8: Model, corpus: Corpus, texts: int = 256) -> dict[str, float]:
    """How far the logits of `int8` are off at every position of the first texts: root mean square in standard
    deviations of the exact ones, the largest in their own unit, and the share of arg-maxes that agree."""
    chosen = [corpus.tokens[a:b] for a, b in zip(corpus.offsets, corpus.offsets[1:], strict=False)][:texts]
    tokens = np.zeros((len(chosen), max(map(len, chosen))), np.int32)  # causal: what follows changes nothing
    for row, ids in zip(tokens, chosen, strict=True):
        row[: len(ids)] = ids
    used = np.arange(tokens.shape[1]) < np.asarray([[len(ids)] for ids in chosen])
    forward = jax.jit(decoder.logits)
    want, got = (np.asarray(forward(m.params, tokens))[used] for m in (exact, int8))
    gap = got - want
    return {
        "rms_of_std": float(np.sqrt(np.mean(gap**2)) / want.std()),
        "largest": float(np.abs(gap).max()),
        "same_arg_max": float(np.mean(got.argmax(-1) == want.argmax(-1))),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file; without it and without a model: the demo")
    parser.add_argument("--set", action="extend", default=[], nargs="+", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    if args.small:
        args.seeds, args.set = args.seeds[:1], args.set + SMALL
    config = load_config(args.config, args.set)
    data = read_requests(str(config.data_path), config.num_edits, config.on_conflict)
    skills = read_capability(config.capability_data) if config.capability_data else []
    models = {w: load_model(config.model_name_or_path, w, config.mesh) for w in ("checkpoint", "int8")}
    exact = models["checkpoint"]
    error = logit_error(*models.values(), encode_requests(exact.tokenizer, data.requests, config, exact.spec))
    print("logits: " + ", ".join(f"{name} {value:.4g}" for name, value in error.items()), flush=True)
    base, before = evaluate(exact, data, skills, config)

    def measure(model: Model) -> dict[str, float | None]:
        """Every figure of a model, and the share of locality probes that it answers as the base does."""
        report, after = evaluate(model, data, skills, config)
        pairs = [
            (b["after"], a["after"]) for b, a in zip(before, after, strict=True) if a["probe"] == "locality"
        ]
        same = statistics.mean(matches(b, a) for b, a in pairs) if pairs else None
        return report["figures"] | {"locality_agreement": same}

    runs: dict[str, list[Any]] = {"float": [], "int8": [], "int8 as it ran": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for name, weights in (("float", "checkpoint"), ("int8", "int8")):
                run = dataclasses.replace(config, seed=seed, weights=weights)
                result = edit(models[weights], data, run, skills)
                folder = Path(scratch) / f"{name}-{seed}"
                save_hf(exact.folder, result.delta.new, folder)
                runs[name].append(measure(load_model(str(folder), mesh=config.mesh)))
                if name == "int8":
                    runs["int8 as it ran"].append(result.report["after"])
    table = {key: {name: mean(own, key) for name, own in runs.items()} for key in runs["float"][0]}
    print(
        f"{'':22}{'before':>10}"
        + "".join(f"{name:>16}" for name in runs)
        + f"{'int8 - float':>16}{'seeds':>8}"
    )
    far = []
    for key, row in table.items():
        if None in row.values():
            continue
        gap = row["int8"] - row["float"]
        far += [key] if abs(gap) > NEAR else []
        spread = statistics.pstdev(run[key] for run in runs["float"])
        start = base["figures"].get(key)
        shown = f"{100 * start:10.1f}" if start is not None else f"{'-':>10}"
        cells = "".join(f"{100 * v:16.1f}" for v in row.values())
        print(f"{key:22}{shown}{cells}{100 * gap:16.1f}{100 * spread:8.1f}")
    if far:
        print(f"note: the exported models differ by more than {100 * NEAR:.0f} points in {', '.join(far)}")
    result = {"benchmark": "int8", "hardware": hardware(), "seeds": args.seeds, "logits": error,
              "before": base["figures"], "mean": table, "runs": runs, "far": far}  # fmt: skip
    finish(result, args.out)


def mean(runs: list[dict[str, float | None]], key: str) -> Any:
    """Over the runs; None where it was not measured."""
    values = [run[key] for run in runs]
    return None if None in values else statistics.mean(values)  # type: ignore[type-var]


if __name__ == "__main__":
    main()

"""What preserving edits cost and keep: demo edits with plain LocFT-BF and with every way to preserve.

    python benchmarks/preserve.py [--seeds 1 2 3 4 5] [--methods plain kl-facts ...]
        [--sequential] [--small]

Every seed is another sample of facts to edit. Half of all other facts may be retained; `lost` is the
share of answers about the other half (a sample of the probes) that are no longer right. Of the four
rephrases of an edit one is trained, the others are asked. METHODS were tuned on seeds 0 and 9.
`--sequential`: 10 batches of 50 edits, each edited into the model that the one before left.

Prints each method's figures, their mean and spread (standard deviation), what it loses of what plain
LocFT-BF loses at the same generalization (on the lines between plain's rows of the same layers), and one
JSON line last.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, hardware

from locft_jax import Config, edit, evaluate, load_model
from locft_jax.config import DEMO_FOLDER
from locft_jax.data.capability import read_capability
from locft_jax.demo.world import Fact, World, make_edits, make_world, prompts

FIGURES = ("reliability", "generalization", "lost", "capability", "steps", "seconds")
KEPT = "KEPT"  # stands for the file of facts that may be retained
METHODS: dict[str, dict[str, Any]] = {
    "plain-one-layer": dict(learning_rate=5e-4, layer=6),
    "plain-slowest": dict(learning_rate=1.45e-4),
    "plain-slow": dict(learning_rate=1.6e-4),
    "plain": dict(learning_rate=2e-4),
    "plain-fast": dict(learning_rate=3e-4),
    # Sources that show no retained fact, but those that the model says by itself.
    "soft-model": dict(learning_rate=3.7e-4, preserve="soft", preserve_data="model"),
    "soft-model-fast": dict(learning_rate=1e-3, preserve="soft", preserve_strength=30.0,
                            preserve_data="model"),
    "null-model": dict(learning_rate=2e-4, preserve="null", preserve_data="model"),
    "kfac-model": dict(learning_rate=1e-3, preserve="kfac", preserve_strength=3.0, preserve_data="model"),
    "kl-model": dict(learning_rate=2.2e-4, preserve_kl=3.0, preserve_data="model"),
    "soft-kl-model": dict(learning_rate=6.5e-4, preserve="soft", preserve_strength=30.0, preserve_kl=1.0,
                          preserve_data="model"),
    "soft-templates": dict(learning_rate=8e-4, preserve="soft", preserve_strength=30.0,
                           preserve_data="templates"),
    # Other facts than those asked.
    "soft-facts": dict(learning_rate=6.5e-4, preserve="soft", preserve_strength=100.0, preserve_data=KEPT),
    # The same facts' prompts alone: what is to stay is what follows them.
    "soft-prompts": dict(learning_rate=6e-4, preserve="soft", preserve_strength=3.0, preserve_tokens="last",
                         preserve_data=KEPT),
    "kl-facts": dict(learning_rate=2e-4, preserve_kl=3.0, preserve_data=KEPT),
    "soft-kl-facts": dict(learning_rate=6.5e-4, preserve="soft", preserve_strength=100.0, preserve_kl=3.0,
                          preserve_data=KEPT),
}  # fmt: skip
SAME = {"layer": (6, 7), "batch_size": 200, "num_epochs": 400, "loss_average": "token", "loss_floor": 3e-3,
        "augment_rephrases": 1, "evaluate": False}  # fmt: skip


def edits_and_kept(
    world: World, count: int, seed: int, probes: int
) -> tuple[list[dict[str, Any]], list[Fact]]:
    """`count` edits, and the half of all other facts that may be retained. The edits' locality probes are
    `probes` of those about the other half."""
    requests = make_edits(world, count, seed)
    edited = {(r["relation"], r["subject"]) for r in requests}
    others = [f for f in world.facts if (f.relation, f.subject) not in edited]
    kept = others[::2]
    shown = {p for f in kept for p in prompts(f)}
    tested = [p["prompt"] for r in requests for p in r["locality_probes"] if p["prompt"] not in shown]
    asked = set(random.Random(seed).sample(tested, min(probes, len(tested))))
    for r in requests:
        r["locality_probes"] = [p for p in r["locality_probes"] if p["prompt"] in asked]
    return requests, kept


def run(
    model: Any,
    batches: Sequence[list[dict[str, Any]]],
    texts: list[tuple[str, str]],
    skills: Any,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Edit the batches one after another; `texts` (prompt, answer), and the edits of earlier batches, are
    retained where the settings say KEPT, as prompts alone where only their last tokens count. Figures of all
    edits at the end."""
    steps, seconds, texts = 0, 0.0, list(texts)
    for batch in batches:
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "kept.txt"
            parts = 1 if settings.get("preserve_tokens") == "last" else 2
            kept.write_text("\n".join(" ".join(text[:parts]) for text in texts))
            own = settings | ({"preserve_data": str(kept)} if settings.get("preserve_data") == KEPT else {})
            result = edit(model, batch, Config(**own))
        model = result.edited
        steps += result.report["steps_run"]
        seconds += result.report["seconds"]["edit"]
        texts += [(r["prompt"], r["target_new"]) for r in batch]
    report, _ = evaluate(model, [r for batch in batches for r in batch], skills, Config(**settings))
    figures = report["figures"]
    return {**figures, "lost": 1 - figures["locality"], "steps": steps, "seconds": seconds}


def of_plain(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Method -> `lost` as a share of plain's at the same mean generalization, where plain has that."""
    plain = [r["mean"] for r in rows if not {"preserve", "preserve_kl", "layer"} & r.keys()]
    line = sorted((m["generalization"], m["lost"]) for m in plain)
    found = {}
    for row in rows:
        at, lost = row["mean"]["generalization"], row["mean"]["lost"]
        if line and row["mean"] not in plain and line[0][0] <= at <= line[-1][0]:
            found[row["method"]] = lost / float(np.interp(at, *zip(*line, strict=True)) or 1)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--probes", type=int, default=1500, help="about facts that are not edited")
    parser.add_argument("--sequential", action="store_true", help="10 batches of 50 edits")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    world, model = make_world(), load_model(str(DEMO_FOLDER / "model"))
    skills = read_capability(str(DEMO_FOLDER / "skills.jsonl"))
    count, size = (500, 50) if args.sequential else (200, 200)
    if args.small:
        args.seeds, args.probes, skills = args.seeds[:1], 20, skills[:20]
        count, size = (4, 2) if args.sequential else (4, 4)
    rows = []
    for name in args.methods:
        runs = []
        for seed in args.seeds:
            requests, kept = edits_and_kept(world, count, seed, args.probes)
            batches = [requests[i : i + size] for i in range(0, count, size)]
            settings = SAME | METHODS[name] | {"seed": seed} | ({"num_epochs": 2} if args.small else {})
            figures = run(model, batches, [(p, f.answer) for f in kept for p in prompts(f)], skills, settings)
            runs.append({k: figures[k] for k in FIGURES})
            print(
                f"{name:16} seed {seed}  " + "  ".join(f"{k} {runs[-1][k]:.4g}" for k in FIGURES), flush=True
            )
        row: dict[str, Any] = {"method": name, **METHODS[name], "runs": runs}
        row["mean"] = {k: statistics.mean(r[k] for r in runs) for k in FIGURES}
        row["spread"] = {k: statistics.pstdev(r[k] for r in runs) for k in FIGURES}
        rows.append(row)
        line = "  ".join(f"{k} {row['mean'][k]:.3f} ± {row['spread'][k]:.3f}" for k in FIGURES)
        print(f"{name:16} mean    {line}", flush=True)
    shares = of_plain(rows)
    for name, share in shares.items():
        print(f"{name:16} loses {share:.0%} of plain's at the same generalization")
    result = {
        "benchmark": "preserve",
        "of_plain": shares,
        "hardware": hardware(),
        "seeds": args.seeds,
        "rows": rows,
    }
    finish(result | {"sequential": args.sequential}, args.out)


if __name__ == "__main__":
    main()

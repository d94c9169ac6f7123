"""Our edit loop against a plain PyTorch + transformers loop that follows the reference.

    python benchmarks/edit_speed.py                 135M Llama shape, layers 20 and 6 of 30, float32
    python benchmarks/edit_speed.py --small         a smoke run in seconds

Same random weights, same edits, same order; torch pads every batch, runs all layers and all logits
in every epoch. Torch runs `--torch-epochs` epochs, which all cost the same, and its time for
`--epochs` is their median times that; ours is measured whole, with the pass that fills the activation
cache, without compilation (reported apart). The losses of the epochs that both ran must agree. Needs
torch (the `test` extra).
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

if __package__ in (None, ""):
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Steps, epoch_flops, finish, hardware, llama_config, matmul_rate, zsre_like
from locft_jax.data.packing import Corpus, Shape, epoch_batches
from locft_jax.editing.site import find_site, parameters, read_site
from locft_jax.editing.step import Hyper, init_state
from locft_jax.editing.trainer import Job, Schedule, run_shape, train
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_weights
from locft_jax.model.activation_cache import cached_source
from locft_jax.model.sharding import make_mesh
from locft_jax.model.weights import Params

SEED, RATE, ROW = 0, 5e-4, 64


def torch_loop(
    torch: Any, model: Any, corpus: Corpus, site: tuple[str, ...], batch: int, epochs: int, device: str
) -> tuple[list[float], list[float]]:
    """The reference's loop: (loss of every step, seconds of every epoch)."""
    named = dict(model.named_parameters())
    for name, value in named.items():
        value.requires_grad_(name in site)
    optimizer = torch.optim.Adam([named[n] for n in site], lr=RATE)
    losses, seconds = [], []
    for epoch in range(epochs):
        begin = time.perf_counter()
        for which in epoch_batches(len(corpus), batch, SEED, epoch):
            longest = int(corpus.lengths[which].max())
            ids = np.zeros((len(which), longest), np.int64)
            labels = np.full((len(which), longest), -100)
            for row, i in enumerate(which):
                text = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]]
                ids[row, : len(text)] = text
                labels[row, corpus.target_start[i] : len(text)] = text[corpus.target_start[i] :]
            seen = torch.tensor(np.arange(longest) < corpus.lengths[which][:, None], device=device).long()
            goal = torch.tensor(labels, device=device)[:, 1:]
            scores = model(torch.tensor(ids, device=device), attention_mask=seen).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(scores.float().transpose(1, 2), goal, reduction="none")
            mask = (goal != -100).float()
            loss = ((loss * mask).sum(1) / mask.sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return losses, seconds


def our_loop(folder: str, corpus: Corpus, layer: int, batch: int, epochs: int) -> dict[str, Any]:
    """Compile first (one epoch), then time the pass that fills the cache, and the epochs."""
    checkpoint, mesh = open_folder(folder), make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    params = Params(checkpoint.spec, load_weights(checkpoint, mesh))
    site = find_site(params.spec, ["model.layers.{}.mlp.down_proj.weight"], [layer])
    schedule = Schedule(batch, epochs, SEED, "example", ROW, Hyper(RATE, 0.0, 0.0))

    def run(schedule: Schedule, shape: Shape | None = None) -> tuple[list[float], float, float]:
        """(loss of every step, seconds of the cache, of all)."""
        steps, begin = Steps(), time.perf_counter()
        source = cached_source(params, corpus, layer, "device", mesh, ROW)
        jax.block_until_ready(source.values)
        cache = time.perf_counter() - begin
        state = init_state(read_site(params, site, mesh, {}))
        done = train(Job(params, mesh, corpus, source, schedule, shape=shape), state, hooks=[steps])
        jax.block_until_ready(done.state.theta)
        return steps.losses, cache, time.perf_counter() - begin

    shape = run_shape(corpus, schedule, mesh)
    _, _, first = run(dataclasses.replace(schedule, epochs=1), shape)
    losses, cache, total = run(schedule)
    rate = matmul_rate(params.spec, shape.rows * shape.length)
    flops = epochs * epoch_flops(params.spec, corpus, layer, parameters(read_site(params, site, mesh, {})))
    filled = int(corpus.read_lengths.sum()) / (shape.rows * shape.length * -(-len(corpus) // batch))
    return {
        "losses": losses,
        "cache_seconds": cache,
        "seconds": total,
        "compile_seconds": max(0.0, first - cache - (total - cache) / epochs),
        "matmul_share": flops / (total - cache) / rate,
        "matmul_gflops": rate / 1e9,
        "slots_filled": filled,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table row a layer, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shape, for a smoke run")
    parser.add_argument("--layers", type=int, nargs="+", help="tuned layers (default 20 6)")
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--torch-epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    args = parser.parse_args(argv)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = "tiny" if args.small else "135m"
    layers = args.layers or ([4] if args.small else [20, 6])
    edits, epochs = (40, 3) if args.small else (args.edits, args.epochs)
    batch = 16 if args.small else args.batch
    settings = llama_config(shape)
    torch.manual_seed(SEED)
    settings.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    corpus = zsre_like(edits, settings["vocab_size"], SEED)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        original = {k: v.clone() for k, v in model.state_dict().items()}
        for layer in layers:
            ours = our_loop(folder, corpus, layer, batch, epochs)
            site = (f"model.layers.{layer}.mlp.down_proj.weight",)
            model.load_state_dict(original)
            theirs, spent = torch_loop(
                torch, model, corpus, site, batch, min(args.torch_epochs, epochs), "cpu"
            )
            gap = np.abs(np.asarray(theirs) / np.asarray(ours.pop("losses")[: len(theirs)]) - 1).max()
            if gap > 1e-3:
                raise SystemExit(f"the loss curves differ by {gap:.2e}: this compares different things")
            row = {
                "layer": layer,
                "ratio": epochs * statistics.median(spent) / ours["seconds"],
                "torch_epoch_seconds": statistics.median(spent),
                "loss_gap": float(gap),
                **ours,
            }
            rows.append(row)
            print(
                f"layer {layer} of {settings['num_hidden_layers']}: {row['ratio']:.2f} x the torch loop "
                f"over {epochs} epochs; {100 * row['matmul_share']:.0f} % of the matrix-product rate; "
                f"{100 * row['slots_filled']:.0f} % of slots filled; losses agree to {gap:.1e}"
            )
    finish(
        {"benchmark": "edit_speed", "shape": shape, "edits": edits, "batch": batch, "epochs": epochs,
         "hardware": hardware(), "rows": rows},
        args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()

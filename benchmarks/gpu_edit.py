"""3,000 edits of the Llama-3-8B shape on one GPU: our loop against a plain PyTorch loop.

    benchmarks/gpu.sh            all of it, a few minutes on an NVIDIA GPU
    benchmarks/gpu.sh --small    a tiny shape on whatever there is, for a smoke run

gpu.sh runs `gpu_edit.py SIDE --results DIR` for each side in a process of its own, then
`gpu_edit.py summary`. Random weights are made on the device, edits are random tokens in ZsRE's
lengths. Ours: frozen weights bfloat16, tuned matrix float32, activation cache on the device; the whole
run is timed, with the pass that fills the cache, without compilation (reported apart). torch:
`edit_speed.torch_loop` (padded batches, all layers, all logits, every epoch) with all weights in
bfloat16 or float32; a few epochs are timed, which all cost the same. The two sides' random weights
differ, so their losses do too: that both loops compute the same thing is what edit_speed.py checks.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    Steps,
    epoch_flops,
    finish,
    hardware,
    llama_config,
    llama_spec,
    peak_gib,
    zsre_like,
)
from benchmarks.edit_speed import RATE, SEED, torch_loop
from locft_jax.editing.site import find_site, parameters, read_site
from locft_jax.editing.step import Hyper, init_state
from locft_jax.editing.trainer import Job, Schedule, run_shape, train
from locft_jax.model.activation_cache import cached_source
from locft_jax.model.sharding import make_mesh
from locft_jax.model.weights import Params, init_weights

SIDES = ("ours", "torch-bfloat16", "torch-float32")
MODULE = "model.layers.{}.mlp.down_proj.weight"


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Our loop: one epoch to compile, then the whole run from the pass that fills the cache on."""
    spec, mesh = llama_spec(args.shape), make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    # One program: the float32 numbers are rounded as they are made and never stored.
    weights = jax.jit(init_weights, static_argnums=(0, 2))(spec, jax.random.key(SEED), jnp.bfloat16)
    params = Params(spec, jax.block_until_ready(weights))
    after_weights = peak_gib()
    corpus = zsre_like(args.edits, spec.vocab_size, SEED)
    site = find_site(spec, [MODULE], [args.layer])
    # No floor: random weights may learn the edits early, and every epoch is to be run.
    schedule = Schedule(args.batch, args.epochs, SEED, "example", 128, Hyper(RATE, 0.0, 0.0))
    shape = run_shape(corpus, schedule, mesh)

    def run(epochs: int) -> tuple[list[float], float, float]:
        """(loss of every step, seconds of the cache, of everything)."""
        steps, state = Steps(), jax.block_until_ready(init_state(read_site(params, site, mesh, {})))
        begin = time.perf_counter()
        source = cached_source(params, corpus, args.layer, "device", mesh, 128)
        jax.block_until_ready(source.values)
        cache = time.perf_counter() - begin
        job = Job(params, mesh, corpus, source, dataclasses.replace(schedule, epochs=epochs), shape=shape)
        done = train(job, state, hooks=[steps])
        jax.block_until_ready(done.state.theta)
        return steps.losses, cache, time.perf_counter() - begin

    begin = time.perf_counter()
    run(1)
    first = time.perf_counter() - begin
    losses, cache, total = run(args.epochs)
    tuned = parameters(read_site(params, site, mesh, {}))
    flops = args.epochs * epoch_flops(spec, corpus, args.layer, tuned)
    slots = shape.rows * shape.length * -(-args.edits // args.batch)
    return {
        "seconds_per_edit": total / args.edits,
        "cache_seconds": cache,
        "epoch_seconds": (total - cache) / args.epochs,
        "compile_seconds": max(0.0, first - cache - (total - cache) / args.epochs),
        "tflops": flops / (total - cache) / 1e12,
        "slots_filled": int(corpus.read_lengths.sum()) / slots,
        "peak_gib": peak_gib(),
        "peak_gib_making_weights": after_weights,
        "losses": [losses[0], losses[-1]],
        "hardware": hardware(),
    }


def theirs(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The torch loop; its first epoch, in which allocator and kernels warm up, is not counted.
    Without torch, or with a GPU too small: only a reason."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return {"reason": "torch is not installed"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.shape == "8b":
        return {"reason": "this torch finds no GPU"}
    settings = llama_config(args.shape)
    settings.pop("model_type")
    corpus = zsre_like(args.edits, settings["vocab_size"], SEED)
    torch.manual_seed(SEED)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        torch.set_default_dtype(torch.float32)
        site = (MODULE.format(args.layer),)
        losses, spent = torch_loop(torch, model, corpus, site, args.batch, 1 + args.torch_epochs, device)
    except torch.OutOfMemoryError:
        return {"reason": "does not fit this GPU's memory"}
    epoch = statistics.median(spent[1:])
    return {
        "seconds_per_edit": args.epochs * epoch / args.edits,
        "epoch_seconds": epoch,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "losses": [losses[0], losses[-1]],
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def summary(args: argparse.Namespace) -> None:
    """One line a side, then one JSON line."""
    sides = {s: json.loads((args.results / f"{s}.json").read_text()) for s in SIDES}
    own = sides["ours"]
    for name, side in sides.items():
        if "reason" in side:
            print(f"{name}: not measured, {side['reason']}")
            continue
        memory = "" if side["peak_gib"] is None else f", peak memory {side['peak_gib']:.1f} GiB"
        if name == "ours":
            own["peak_share"] = own["tflops"] / args.peak_tflops
            more = (
                f", {own['tflops']:.0f} useful TFLOP/s in the epochs, {100 * own['peak_share']:.0f} % of "
                f"{args.peak_tflops:g}; {100 * own['slots_filled']:.0f} % of slots filled; "
                f"compilation {own['compile_seconds']:.0f} s apart"
            )
        else:
            side["ratio"] = side["seconds_per_edit"] / own["seconds_per_edit"]
            more = f"; ours is {side['ratio']:.2f} x as fast"
        print(f"{name}: {side['seconds_per_edit']:.5f} s an edit{memory}{more}")
    settings = {k: getattr(args, k) for k in ("shape", "layer", "edits", "batch", "epochs", "peak_tflops")}
    finish({"benchmark": "gpu_edit", "hardware": own["hardware"], **settings, "sides": sides}, args.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one side, or put the sides' results together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=(*SIDES, "summary"))
    parser.add_argument("--results", type=Path, required=True, help="folder of the sides' results")
    parser.add_argument("--small", action="store_true", help="tiny shape, for a smoke run")
    parser.add_argument("--shape", default="8b", choices=("tiny", "135m", "8b"))
    parser.add_argument("--layer", type=int, default=22)
    parser.add_argument("--edits", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--torch-epochs", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, default=989, help="dense bfloat16 (default: H100, H200)")
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    args = parser.parse_args(argv)
    if args.small:
        args.shape, args.layer, args.edits, args.batch, args.epochs = "tiny", 4, 40, 16, 3
        args.torch_epochs = 1
    if args.side == "summary":
        return summary(args)
    result = ours(args) if args.side == "ours" else theirs(args, args.side.removeprefix("torch-"))
    if "losses" in result and not np.all(np.isfinite(result["losses"])):
        raise SystemExit(f"{args.side}: the loss is not finite: {result['losses']}")
    (args.results / f"{args.side}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

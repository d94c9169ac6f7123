"""Edit steps of a Qwen2.5-72B-shaped model on one GPU: int8 frozen weights, made on the device.

    python benchmarks/gpu_72b.py [--steps 20] [--layers 80] [--small]

Random weights in the shape of `configs/models/Qwen2.5-72B-Instruct.json` (a GPU of 80 GB holds them in
int8; with fewer `--layers` a smaller one does), random tokens in ZsRE's lengths, batches of 100 in packed
rows of 128, `down_proj` of layer 19 tuned in float32, activations below it cached on the device. Prints
seconds a step, useful TFLOP/s and peak memory, and one JSON line last.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peak memory is then what was needed

import jax
import jax.numpy as jnp
from common import Steps, epoch_flops, finish, hardware, peak_gib, zsre_like

from locft_jax.editing.site import find_site, parameters, read_site
from locft_jax.editing.step import Hyper, init_state
from locft_jax.editing.trainer import Job, Schedule, run_shape, train
from locft_jax.model.activation_cache import cached_source
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import ModelSpec, parse_spec
from locft_jax.model.weights import Params, Quantized, Weights, abstract_weights

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "models" / "Qwen2.5-72B-Instruct.json"
MODULE, BATCH, ROW = "model.layers.{}.mlp.down_proj.weight", 100, 128
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512, "head_dim": 16}  # fmt: skip


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """Matrices int8 with one scale (standard deviation about 0.02), norms 1 and biases 0 in bfloat16. Each is
    made on the device by a program of its own: nothing larger than itself is ever there."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    bits = jax.jit(functools.partial(jax.random.bits, dtype=jnp.uint8), static_argnums=1)
    made: Weights = {}
    for name, leaf in abstract_weights(spec, jnp.dtype(jnp.bfloat16), int8=True).items():
        if isinstance(leaf, Quantized):
            values = jax.lax.bitcast_convert_type(bits(next(keys), leaf.values.shape), jnp.int8)
            made[name] = Quantized(values, jnp.full(leaf.scale.shape, 0.02 / 74, jnp.float32))
        else:
            made[name] = (jnp.ones if "norm" in name else jnp.zeros)(leaf.shape, leaf.dtype)
    return jax.block_until_ready(made)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="that are timed, after two that compile")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--layer", type=int, default=19)
    parser.add_argument("--small", action="store_true", help="a tiny shape, on whatever there is")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    config = json.loads(CONFIG.read_text()) | {"num_hidden_layers": args.layers}
    if args.small:
        config |= SMALL | {"num_hidden_layers": 3}
        args.layer, args.steps = 1, 2
    spec, mesh = parse_spec(config), make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    begin = time.perf_counter()
    params = Params(spec, random_weights(spec))
    print(f"weights made in {time.perf_counter() - begin:.0f} s", flush=True)
    corpus = zsre_like(BATCH * (args.steps + 2), spec.vocab_size)
    site = find_site(spec, [MODULE], [args.layer])
    schedule = Schedule(BATCH, 1, 0, "example", ROW, Hyper(5e-4, 0.0, 0.0))
    begin = time.perf_counter()
    source = cached_source(params, corpus, args.layer, "device", mesh, ROW)
    jax.block_until_ready(source.values)
    cache = time.perf_counter() - begin
    own = {n: 0.02 * jax.random.normal(jax.random.key(1), (spec.d_model, spec.d_ff)) for n in site}
    state, steps = init_state(read_site(params, site, mesh, own)), Steps()
    shape = run_shape(corpus, schedule, mesh)
    done = train(Job(params, mesh, corpus, source, schedule, shape=shape), state, hooks=[steps])
    step = statistics.median(b - a for a, b in zip(steps.times[2:], steps.times[3:], strict=False))
    tuned = parameters(done.state.theta)
    flops = epoch_flops(spec, corpus, args.layer, tuned) / (args.steps + 2)
    result: dict[str, Any] = {
        "benchmark": "gpu_72b",
        "hardware": hardware(),
        "layers": args.layers if not args.small else 3,
        "weights_gib": sum(a.nbytes for a in jax.tree.leaves(params.weights)) / 2**30,
        "seconds_a_step": step,
        "tflops": flops / step / 1e12,
        "cache_seconds": cache,
        "peak_gib": peak_gib(),
        "losses": [steps.losses[0], steps.losses[-1]],
        "shape": dataclasses.asdict(shape),
    }
    memory = "" if result["peak_gib"] is None else f", peak memory {result['peak_gib']:.1f} GiB"
    print(
        f"{step:.2f} s a step of {BATCH} edits, {result['tflops']:.0f} useful TFLOP/s; "
        f"weights {result['weights_gib']:.1f} GiB{memory}"
    )
    finish(result, args.out)


if __name__ == "__main__":
    main()

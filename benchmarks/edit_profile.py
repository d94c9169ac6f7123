"""Where a training step's time goes: each part of a layer and the head by itself, against the machine's own
matrix-product rate.

    python benchmarks/edit_profile.py               135M Llama shape, float32, the batch of edit_speed.py
    python benchmarks/edit_profile.py --small       a smoke run in seconds

`products` counts matrix products only (of the whole block: attention scores too little to count), so that
100 % would mean that everything else is free.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __package__ in (None, ""):
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, hardware, layer_parameters, llama_spec, matmul_rate, seconds
from locft_jax.data.packing import Rows
from locft_jax.model import decoder
from locft_jax.model.weights import Params, init_weights


def pull(f: Callable[..., jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f(x), and what goes back to x when y goes back from it (anything, but known only when it runs)."""
    y, back = jax.vjp(f, x)
    return y, back(y)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line a part, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shape, for a smoke run")
    parser.add_argument("--rows", type=int, default=28, help="packed rows of 64 tokens (100 edits: 28)")
    parser.add_argument("--targets", type=int, default=448, help="target positions (100 edits: about 400)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    args = parser.parse_args(argv)
    spec = llama_spec("tiny" if args.small else "135m")
    batch, length, of = (2, 64, 16) if args.small else (args.rows, 64, 16)
    tokens, targets = batch * length, 32 if args.small else args.targets
    weights = init_weights(spec, jax.random.key(0))
    own = {k: a[1] for k, a in weights.items() if k not in ("embed", "norm", "head")}
    place = np.arange(length)[None].repeat(batch, 0)
    rows = Rows(jnp.asarray(1 + place // of, jnp.int32), jnp.asarray(place % of, jnp.int32))
    window = decoder.windows(spec)[0]
    x = jax.random.normal(jax.random.key(1), (batch, length, spec.d_model))
    q = jax.random.normal(jax.random.key(2), (batch, length, spec.n_heads, spec.head_dim))
    k = q[:, :, : spec.n_kv_heads]
    labels = jnp.arange(targets) % spec.vocab_size

    def attend(q: jax.Array) -> jax.Array:
        return decoder.attention(q, k, k, decoder.segment_mask(rows.segments, rows.positions, rows, window))

    def loss(x: jax.Array) -> jax.Array:
        scores = decoder.head(Params(spec, weights), x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels)

    def mlp(x: jax.Array) -> jax.Array:
        h = decoder.rms_norm(x, own["mlp_norm"], spec.rms_eps)
        gate, up = decoder.project("gate", h, own), decoder.project("up", h, own)
        return x + decoder.project("down", jax.nn.silu(gate) * up, own)

    def layer(x: jax.Array) -> jax.Array:
        return decoder.layer(spec, own, x, decoder.packed(rows, window))[0]

    mlp_flops = 2 * tokens * 3 * spec.d_model * spec.d_ff
    layer_flops = 2 * tokens * sum(layer_parameters(spec))
    head_flops = 2 * targets * spec.d_model * spec.vocab_size
    parts: dict[str, tuple[Callable[[jax.Array], Any], jax.Array, int | None]] = {
        "one product, forward (x W^T)": (lambda x: decoder.project("gate", x, own), x, mlp_flops // 3),
        "MLP, forward": (mlp, x, mlp_flops),
        "MLP, forward and backward": (lambda x: pull(mlp, x), x, 2 * mlp_flops),
        "attention, forward": (attend, q, None),
        "attention, forward and backward": (lambda q: pull(attend, q), q, None),
        "rotary of the queries, forward": (
            lambda q: decoder.rotate(q, rows.positions, decoder.rope_frequencies(spec)), q, None,
        ),
        "layer, forward": (layer, x, layer_flops),
        "layer, forward and backward": (lambda x: pull(layer, x), x, 2 * layer_flops),
        "head and loss, forward and backward": (
            lambda x: pull(loss, x), x.reshape(tokens, -1)[:targets], 2 * head_flops,
        ),
    }  # fmt: skip
    rate = matmul_rate(spec, tokens)
    found = {}
    for name, (f, argument, flops) in parts.items():
        run = jax.jit(f)
        took = seconds(lambda run=run, argument=argument: run(argument), args.repeats)
        share = None if flops is None else flops / took / rate
        found[name] = {"milliseconds": 1e3 * took, "products": share}
        print(
            f"{name:36} {1e3 * took:8.2f} ms"
            + ("" if share is None else f"  {100 * share:4.0f} % of the rate")
        )
    result = {"benchmark": "edit_profile", "hardware": hardware(), "gflops": rate / 1e9, "parts": found}
    finish(result, args.out)


if __name__ == "__main__":
    main()

"""What the benchmarks share: shapes, random models, ZsRE-length edits, the machine's own rate."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locft_jax.data.packing import Corpus, corpus_from_lists
from locft_jax.editing.hooks import Hook, StepRecord
from locft_jax.model.spec import ModelSpec, parse_spec

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, rope_theta=500000.0),
}  # fmt: skip


def llama_config(shape: str) -> dict[str, Any]:
    """`config.json` values of a Llama of one of the SHAPES."""
    common = dict(model_type="llama", max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
                  tie_word_embeddings=True, eos_token_id=0, bos_token_id=None)  # fmt: skip
    return {**common, **SHAPES[shape]}


def llama_spec(shape: str) -> ModelSpec:
    """The ModelSpec of one of the SHAPES."""
    return parse_spec(llama_config(shape))


def zsre_like(count: int, vocab: int, seed: int = 0) -> Corpus:
    """Random token ids in the lengths of ZsRE edits under a Llama tokenizer: prompts of 6 to 25 tokens
    (mean about 12), targets of 1 to 10 (mean about 3), one EOS."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(np.round(rng.gamma(9.0, 1.3, count)), 6, 25).astype(int)
    targets = np.clip(np.round(rng.gamma(2.2, 1.3, count)), 1, 10).astype(int)
    parts = [[*rng.integers(1, vocab, p + t), 0] for p, t in zip(prompts, targets, strict=True)]
    return corpus_from_lists(parts, prompts)


class Steps(Hook):
    """The loss of every step, and when it was known (the first time: when the loop began)."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def on_start(self, done: Sequence[StepRecord]) -> None:
        self.times.append(time.perf_counter())

    def on_step(self, record: StepRecord) -> None:
        self.losses.append(record.loss)
        self.times.append(time.perf_counter())


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Best of several timed calls, after one that compiles."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - begin)
    return best


def matmul_rate(spec: ModelSpec, tokens: int, dtype: Any = jnp.float32) -> float:
    """FLOP/s of a chain of plain matrix products of the model's own MLP sizes: what this machine
    reaches when it does nothing else."""
    x = jnp.ones((tokens, spec.d_model), dtype)
    up, down = jnp.ones((spec.d_ff, spec.d_model), dtype), jnp.ones((spec.d_model, spec.d_ff), dtype)

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = jnp.einsum("tf,df->td", jnp.einsum("td,fd->tf", x, up), down)
        return x

    return 8 * 2 * 2 * tokens * spec.d_model * spec.d_ff / seconds(lambda: chain(x), 5)


def layer_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Matrix parameters of one layer: (those needed at every position in the last block, the rest)."""
    keys_values = 2 * spec.n_kv_heads * spec.head_dim * spec.d_model
    rest = 2 * spec.n_heads * spec.head_dim * spec.d_model + 3 * spec.d_model * spec.d_ff
    return keys_values, rest


def epoch_flops(spec: ModelSpec, corpus: Corpus, layer: int, site_parameters: int) -> float:
    """Useful FLOPs of one epoch with cached activations below `layer`, for one tuned MLP matrix: the
    site's layer forward and its weight gradient, forward and input gradient of the layers above, head
    and last block's query, output and MLP at target positions only; attention scores and the last token of
    each text, which is only predicted, not counted."""
    tokens, targets = int(corpus.read_lengths.sum()), int(corpus.target_lengths.sum())
    keys_values, rest = layer_parameters(spec)
    above = spec.n_layers - 2 - layer  # whole layers between the site's and the last
    blocks = (2 + 4 * above) * tokens * (keys_values + rest) + 4 * (tokens * keys_values + targets * rest)
    return blocks + 2 * tokens * site_parameters + 4 * targets * spec.vocab_size * spec.d_model


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as one JSON line, last; also write it to `out`."""
    line = json.dumps(result)
    if out is not None:
        out.write_text(line + "\n")
    print(line)


def peak_gib() -> float | None:
    """Most device memory JAX has held so far, None where the backend keeps no count."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def hardware() -> str:
    """What this ran on."""
    import os

    device = jax.devices()[0]
    name = device.device_kind if device.platform != "cpu" else _cpu_name()
    return f"{len(jax.devices())} x {name}" if device.platform != "cpu" else f"{os.cpu_count()} cores, {name}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((l.split(":", 1)[1].strip() for l in lines if l.startswith("model name")), "CPU")

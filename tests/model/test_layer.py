"""The one layer body against plain numpy: what a tap sees enter each matrix, and what leaves the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax.data.packing import Rows, Targets
from locft_jax.model import decoder
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import init_weights

CONFIG = {
    "vocab_size": 16,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FAMILIES = {  # biases, norms of queries and keys, a window
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 3},
}
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6]], np.int32)
ROWS = Rows(SEGMENTS, POSITIONS)
AT = np.array([2, 7, 10, 17])  # targets among the 2 x 9 positions
TARGETS = Targets(AT, np.array([0, 1, 2, 3]), np.array([[0, 1], [2, 3]]))


def make(family):
    """(spec, a layer's weights, x [2, 9, D])"""
    spec = parse_spec({"model_type": family, **CONFIG, **FAMILIES[family]})
    stacked = init_weights(spec, jax.random.key(0))
    rng = np.random.default_rng(0)
    w = {k: 0.3 * rng.standard_normal(a.shape[1:]).astype(np.float32) + ("norm" in k)
         for k, a in decoder.stacks(stacked).items()}  # fmt: skip
    return spec, w, rng.standard_normal((2, 9, spec.d_model)).astype(np.float32)


def by_hand(spec, w, x):
    """Token by token, head by head, in float64: ({matrix: what enters it}, what leaves the layer)."""
    w, x = {k: a.astype(np.float64) for k, a in w.items()}, x.astype(np.float64)
    norm = lambda a, scale: a / np.sqrt((a * a).mean(-1, keepdims=True) + spec.rms_eps) * scale  # noqa: E731
    h = norm(x, w["attn_norm"])
    half, width = spec.head_dim // 2, spec.head_dim
    turn = np.exp(1j * POSITIONS[..., None] * spec.rope_theta ** (-np.arange(half) / half))

    def heads(key, count):
        a = (h @ w[key].T + w.get(f"{key}_bias", 0)).reshape(2, 9, count, width)
        return norm(a, w[f"{key}_norm"]) if f"{key}_norm" in w else a

    def rotated(a):
        turned = (a[..., :half] + 1j * a[..., half:]) * turn[:, :, None]
        return np.concatenate([turned.real, turned.imag], -1)

    q, k, v = (
        rotated(heads("q", spec.n_heads)),
        rotated(heads("k", spec.n_kv_heads)),
        heads("v", spec.n_kv_heads),
    )
    attended = np.zeros(q.shape)
    for b, t in np.ndindex(2, 9):
        distance = POSITIONS[b, t] - POSITIONS[b]
        keys = np.flatnonzero(
            (SEGMENTS[b] == SEGMENTS[b, t]) & (distance >= 0) & (distance < spec.windows[0])
        )
        for n in range(spec.n_heads):
            own = n // (spec.n_heads // spec.n_kv_heads)
            scores = np.exp(k[b, keys, own] @ q[b, t, n] / np.sqrt(width))
            attended[b, t, n] = scores / scores.sum() @ v[b, keys, own]
    attended = attended.reshape(2, 9, -1)
    x = x + attended @ w["o"].T
    m = norm(x, w["mlp_norm"])
    gate = m @ w["gate"].T
    inner = gate / (1 + np.exp(-gate)) * (m @ w["up"].T)
    seen = {"q": h, "k": h, "v": h, "o": attended, "gate": m, "up": m, "down": inner}
    return seen, x + inner @ w["down"].T


@pytest.mark.parametrize("targets", [None, TARGETS], ids=["packed", "targets"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_sees_what_enters_each_matrix(family, targets):
    spec, w, x = make(family)
    assert ("q_bias" in w, "q_norm" in w) == (family == "qwen2", family == "qwen3")
    want, left = by_hand(spec, w, x)

    @jax.jit
    def run(w, x):
        seen = {}

        def tap(key, x, w):
            assert key not in seen  # once each
            seen[key] = x
            return decoder.project(key, x, w)

        window = decoder.windows(spec)[0]
        how = decoder.packed_targets(ROWS, window, targets) if targets else decoder.packed(ROWS, window)
        out, kept = decoder.layer(spec, w, x, how, tap)
        return seen, out, decoder.layer(spec, w, x, how)[0], kept

    seen, out, plain, (keys, values) = run(w, x)
    assert seen.keys() == want.keys() and keys.shape == values.shape == (2, 9, spec.n_kv_heads, spec.head_dim)
    used = (SEGMENTS > 0).reshape(-1)

    def same(got, want, everywhere):
        want = want.reshape(18, -1)
        got, want = (got.reshape(18, -1)[used], want[used]) if everywhere else (got, want[AT])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    for key, value in want.items():
        same(
            seen[key], value, targets is None or key in ("k", "v")
        )  # keys and values of all, the rest of targets
    same(out, left, targets is None)
    np.testing.assert_array_equal(out, plain)  # a tap that only looks changes nothing


def test_what_a_tap_returns_is_what_the_matrix_gives():
    """Something added to each output in turn is a bias of that matrix."""
    spec, w, x = make("qwen2")
    how = decoder.packed(ROWS, decoder.windows(spec)[0])
    run = jax.jit(lambda w, nudge: decoder.layer(
        spec, w, x, how, lambda key, x, w: decoder.project(key, x, w) + nudge.get(key, 0))[0])  # fmt: skip
    none = {key: jnp.zeros(w[key].shape[0]) for key in ("q", "k", "v", "o", "gate", "up", "down")}
    before = run(w, none)
    for key in ("q", "k", "v"):
        nudged = run(w, none | {key: none[key] + 0.5})
        biased = run(w | {f"{key}_bias": w[f"{key}_bias"] + 0.5}, none)
        np.testing.assert_allclose(nudged, biased, rtol=1e-5, atol=1e-5)
        assert np.abs(nudged - before).max() > 1e-2
    np.testing.assert_allclose(
        run(w, none | {"down": none["down"] + 0.5}), before + 0.5, rtol=1e-5, atol=1e-5
    )

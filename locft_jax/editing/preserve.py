"""Edits that keep their hands off everything else: what the model's other inputs look like to a tuned
matrix, and updates that avoid it.

A change dW [out, in] alters the outputs on retained inputs x by tr(dW C dW^T), C = E[x x^T]. Every update
is multiplied on the input side by a matrix P [in, in], after Adam (editing/step.py):

    soft   P = lambda (C + lambda I)^-1, lambda = mean eigenvalue of C / strength
    null   P = the projection out of C's leading eigenvectors, which hold the share `strength` of its trace

Exact C only: inputs wider than MAX_WIDTH are refused.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from locft_jax.config import Config
from locft_jax.data.records import open_records
from locft_jax.data.requests import EditRequest
from locft_jax.data.tokens import (
    Batch,
    corpus_from_lists,
    even_rows,
    fit_shape,
    pack,
    prompt_ids,
    sequential_batches,
)
from locft_jax.editing.site import materialize
from locft_jax.editing.step import Sides
from locft_jax.errors import UserError
from locft_jax.model import decoder
from locft_jax.model.hf import Model
from locft_jax.model.sharding import replicated, rows_sharding, tensor_spec
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Edits, Weights, locate_tensor

MAX_WIDTH = 8192  # of a tuned matrix's input: C and P are [width, width]
DEFAULT_STRENGTH = {"soft": 10.0, "null": 0.9}
SAMPLES, SAMPLE_LENGTH, SAMPLE_ROWS = 512, 32, 128  # sequences of so many tokens at most, so many at once
ROWS = 64  # of a batch of the pass that sums C up
INPUTS = {"q": "attn", "k": "attn", "v": "attn", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}

Moments = dict[str, jax.Array]  # HF tensor name -> C [in, in] float32


def preserves(config: Config) -> bool:
    """Whether anything of other texts is to be retained."""
    return config.preserve != "none" or bool(config.preserve_kl)


def strength_of(config: Config) -> float | None:
    """The config's strength, or the method's default; None without a method."""
    given = config.preserve_strength
    return given if given is not None else DEFAULT_STRENGTH.get(config.preserve)


def source_of(config: Config) -> str:
    """Where the retained inputs come from: `model` (also the default), `templates`, or a file."""
    return config.preserve_data or "model"


def told(config: Config) -> dict[str, Any] | None:
    """Method, strength, lambda's rule, the divergence's weight and source, for reports and deltas; None when
    off."""
    if not preserves(config):
        return None
    rule = {"soft": "trace(C) / n / strength"}.get(config.preserve)
    return {
        "method": config.preserve,
        "strength": strength_of(config) if config.preserve != "none" else None,
        "lambda": rule,
        "kl": config.preserve_kl or None,
        "source": source_of(config),
    }


# ---------------------------------------------------------------- checks, and what is retained


def check_preserve(spec: ModelSpec, site: Sequence[str], config: Config) -> None:
    """Raise UserError where `preserve` cannot work on this site; needs no weights."""
    if config.preserve == "none":
        return
    for name in site:
        row, _ = locate_tensor(spec, name)
        if row.key in ("embed", "head"):
            raise UserError(
                f"preserve: {name} is tuned, but {config.preserve} works on the matrices of layers only; "
                "use another rewrite_module, or preserve=none"
            )
        if row.key in INPUTS and row.shape[1] > MAX_WIDTH:
            raise UserError(
                f"preserve: {name} has inputs of width {row.shape[1]}; this version handles at most "
                f"{MAX_WIDTH}; tune a matrix with a narrower input, or use preserve=none"
            )
    if all(locate_tensor(spec, name)[0].key not in INPUTS for name in site):
        raise UserError("preserve: the site holds no matrix; use another rewrite_module, or preserve=none")


def retained_texts(config: Config, requests: Sequence[EditRequest]) -> list[str] | None:
    """Texts whose inputs are retained; None where there are none: preserve is off, or the source is the
    model itself. Files: `.txt`, a text a line; `.json`, `.jsonl`, `.csv`, records (also of a Hub
    set) with `text` or `prompt`. Raises UserError for a file that holds none, and for templates without
    subjects."""
    source = source_of(config)
    if not preserves(config) or source == "model":
        return None
    if source == "templates":
        return template_texts(requests, config.seed)
    path = Path(source)
    if path.suffix == ".txt":
        try:
            texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as e:
            raise UserError(f"preserve_data: {source} cannot be read as UTF-8 text ({e})") from None
    else:
        texts = []
        for where, record in open_records(source)[1]:
            text = record.get("text", record.get("prompt")) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"preserve_data: {where}: no `text` and no `prompt`")
            texts.append(text.strip())
    texts = [t for t in texts if t]
    if not texts:
        raise UserError(f"preserve_data: {source} holds no text")
    return texts


def template_texts(requests: Sequence[EditRequest], seed: int, each: int = 4) -> list[str]:
    """The edit prompts with made-up subjects, `each` a prompt: every word of the subject is the first half
    of one subject's word and the second half of another's, and no such word stands in any of the requests
    (prompts, targets or probes), so that no retained fact is shown. Raises UserError when no request has a
    subject that stands in its prompt."""
    usable = [r for r in requests if r.subject and r.subject in r.prompt]
    if not usable:
        raise UserError("preserve_data: templates needs edits whose `subject` stands in their `prompt`")
    words = sorted({w for r in usable for w in str(r.subject).split() if len(w) > 1})
    known = set(" ".join(map(str, requests)).replace("'", " ").replace(",", " ").split())
    rng = np.random.default_rng([seed, len(usable)])

    def made_up(word: str) -> str:
        for _ in range(50):
            a, b = (words[i] for i in rng.integers(0, len(words), 2))
            new = a[: (len(a) + 1) // 2] + b[len(b) // 2 :]
            if new not in known:
                return new
        return word[:1] + word[:0:-1]  # so few subjects that halves make no new word: backwards

    subjects = [[" ".join(map(made_up, str(r.subject).split())) for _ in range(each)] for r in usable]
    return [
        r.prompt.replace(str(r.subject), s) for r, some in zip(usable, subjects, strict=True) for s in some
    ]


# ---------------------------------------------------------------- second moments


def layer_inputs(
    spec: ModelSpec, w: dict[str, jax.Array], x: jax.Array, rows: Any, window: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """decoder.block, and what enters its matrices: {value of INPUTS: [B, T, in]}."""
    h = decoder.rms_norm(x, w["attn_norm"], spec.rms_eps)
    k, v = decoder.keys_values(spec, w, h, rows.positions)
    mask = decoder.segment_mask(rows.segments, rows.positions, rows, window)
    attended = decoder.attention(decoder.queries(spec, w, h, rows.positions), k, v, mask)
    x = x + decoder.linear(attended, w["o"])
    m = decoder.rms_norm(x, w["mlp_norm"], spec.rms_eps)
    f = jax.nn.silu(decoder.linear(m, w["gate"])) * decoder.linear(m, w["up"])
    return x + decoder.linear(f, w["down"]), {"attn": h, "o": attended, "mlp": m, "down": f}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    spec: ModelSpec,
    wanted: tuple[tuple[int, str], ...],
    weights: Weights,
    edits: Edits,
    tokens: jax.Array,
    batch: Batch,
) -> dict[str, jax.Array]:
    """Sums of x x^T over a batch's tokens, {"layer.input": [in, in] float32}, for the wanted inputs."""
    x = decoder.embed(spec, weights, edits, tokens[batch.index])
    used = (batch.rows.segments > 0)[..., None]
    found: dict[str, jax.Array] = {}
    at = 0
    for layer in sorted({l for l, _ in wanted}):
        x = decoder.run_layers(spec, weights, edits, x, batch.rows, at, layer) if layer > at else x

        def body(w: dict[str, jax.Array], l: Any, carry: Any, layer: int = layer) -> Any:
            x, inputs = layer_inputs(spec, w, carry, batch.rows, decoder.windows(spec)[layer])
            for kind, value in inputs.items():
                if (layer, kind) in wanted:
                    z = jnp.where(used, value, 0).astype(jnp.float32)
                    found[f"{layer}.{kind}"] = jnp.einsum(
                        "btd,bte->de", z, z, precision=jax.lax.Precision.HIGHEST
                    )
            return x

        x, at = decoder.fold_layers(spec, weights, edits, body, x, layer, layer + 1), layer + 1
    return found


def second_moments(
    spec: ModelSpec,
    weights: Weights,
    site: Sequence[str],
    texts: Sequence[Sequence[int]],
    mesh: Mesh,
    row_length: int,
    base: Edits = {},  # noqa: B006 (never written to)
) -> Moments:
    """C = E[x x^T] [in, in], float32, over the tokens of texts (token ids), for every matrix of the site in
    a layer; matrices with one input share one array. Streams over the texts once."""
    # A batch does not read a text's last token, so each gets one more.
    corpus = corpus_from_lists([[*ids, ids[-1]] for ids in texts], [len(ids) for ids in texts])
    located = {name: locate_tensor(spec, name) for name in site}
    keys = {n: (l, INPUTS[row.key]) for n, (row, l) in located.items() if row.key in INPUTS and l is not None}
    wanted = tuple(sorted(set(keys.values())))
    length, rows = even_rows(corpus, row_length, ROWS, mesh.shape["data"])
    batches = list(sequential_batches(corpus, rows, length))
    shape = fit_shape(corpus, batches, length, mesh.shape["data"])
    tokens = jax.device_put(corpus.tokens, replicated(mesh))
    total: dict[str, jax.Array] | None = None
    for which in batches:
        batch = pack(corpus, which, shape)
        assert batch is not None, "fit_shape saw every batch"
        split = rows_sharding(mesh, batch.index.shape[0])
        batch = jax.tree.map(
            lambda a, s=split: jax.device_put(a, s if a.ndim == 2 else replicated(mesh)), batch
        )
        sums = _sums(spec, wanted, weights, materialize({}, base), tokens, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "a corpus is never empty"
    mean = {key: value / sum(map(len, texts)) for key, value in total.items()}
    return {name: mean[f"{layer}.{kind}"] for name, (layer, kind) in keys.items()}


@functools.partial(jax.jit, static_argnums=0)
def _sample(
    spec: ModelSpec, weights: Weights, edits: Edits, tokens: jax.Array, stop: jax.Array, key: jax.Array
) -> jax.Array:
    """tokens [B, T] filled from column 1 on by sampling at temperature 1; `stop` [V] ends a row."""
    time = tokens.shape[1]
    rows = decoder.Rows(
        jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), tokens.shape)
    )

    def more(carry: Any) -> jax.Array:
        return (carry[0] < time) & ~jnp.all(carry[2])

    def step(carry: Any) -> Any:
        at, tokens, done = carry
        x = decoder.embed(spec, weights, edits, tokens)
        x = decoder.run_layers(spec, weights, edits, x, rows, 0, spec.n_layers)
        x = jax.lax.dynamic_index_in_dim(x, at - 1, 1, keepdims=False)
        new = jax.random.categorical(jax.random.fold_in(key, at), decoder.head(spec, weights, edits, x))
        new = jnp.where(done, -1, new).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, new[:, None], (0, at))
        return at + 1, tokens, done | stop[new] | (new < 0)

    done = jnp.zeros(tokens.shape[0], bool)
    return jax.lax.while_loop(more, step, (jnp.int32(1), tokens, done))[1]


def sample_model(
    model: Model, seed: int, count: int = SAMPLES, length: int = SAMPLE_LENGTH
) -> list[list[int]]:
    """`count` token sequences from the model itself: seeded, temperature 1, from BOS (where the tokenizer
    has one, else EOS) to the first EOS or `length` tokens. Without a cache of keys: every token runs the
    sequence anew, which is why they are short. Raises UserError without BOS and EOS."""
    start = model.tokenizer.bos_token_id
    start = model.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError("preserve_data: model needs a tokenizer with BOS or EOS; give a file of texts")
    stop = np.zeros(model.spec.vocab_size, bool)
    stop[list(model.eos)] = True
    length = min(length, model.spec.max_position)
    found: list[list[int]] = []
    for part in range(-(-count // SAMPLE_ROWS)):
        tokens = np.full((SAMPLE_ROWS, length), -1, np.int32)
        tokens[:, 0] = start
        placed = jax.device_put(tokens, rows_sharding(model.mesh, SAMPLE_ROWS))
        key = jax.random.fold_in(jax.random.key(seed), part)
        out = np.asarray(_sample(model.spec, model.weights, model.edits, placed, jnp.asarray(stop), key))
        found += [row[row >= 0].tolist() for row in out]
    return found[:count]


# ---------------------------------------------------------------- the matrices that updates meet


def input_matrix(moment: np.ndarray, method: str, strength: float) -> np.ndarray:
    """P [in, in] float32 of C [in, in] (module docstring); computed in float64."""
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    values = np.maximum(values, 0)
    if method == "soft":
        mean = values.mean()
        scale = mean / (values * strength + mean) if mean > 0 else np.ones_like(values)
    else:
        above = np.cumsum(values[::-1])[::-1] - values  # trace held by the larger ones
        scale = np.where(above < strength * values.sum(), 0.0, 1.0)
    return ((vectors * scale) @ vectors.T).astype(np.float32)


def retained_ids(model: Model, config: Config, texts: Sequence[str] | None) -> list[list[int]]:
    """Token ids of the retained texts, of those with two tokens or more; [] when nothing is retained. `texts`
    as from `retained_texts`; without any, the model's own. Raises UserError where there are none."""
    if not preserves(config):
        return []
    if texts is None:
        return sample_model(model, config.seed)
    ids = prompt_ids(model.tokenizer, texts, config.chat_template)
    ids = [i[: model.spec.max_position] for i in ids if len(i) > 1]
    if not ids:
        raise UserError(f"preserve_data: {source_of(config)} holds no text of two tokens or more")
    return ids


def make_preserve(
    model: Model, site: Sequence[str], config: Config, ids: Sequence[Sequence[int]]
) -> dict[str, Sides]:
    """{HF name: (P_in [in, in], None)} for the site's matrices, {} when off. `ids` as from `retained_ids`.
    The same arguments give the same bits, so a resumed run makes it again."""
    strength = strength_of(config)
    if config.preserve == "none" or strength is None:
        return {}
    moments = second_moments(model.spec, model.weights, site, ids, model.mesh, config.row_length, model.edits)
    made: dict[int, np.ndarray] = {}
    placed: dict[str, Sides] = {}
    for name, moment in moments.items():
        if id(moment) not in made:
            made[id(moment)] = input_matrix(np.asarray(moment), config.preserve, strength)
        parts = [*tensor_spec(model.mesh, model.spec, locate_tensor(model.spec, name)[0], False), None, None]
        # Columns lie where the tensor's do: the updates then keep their sharding.
        sharding = NamedSharding(model.mesh, P(None, parts[1]) if parts[1] else P())
        placed[name] = jax.device_put(made[id(moment)], sharding), None
    return placed

"""Train the demo model: a small Llama that knows the demo world, as an ordinary HF folder.

    python -m locft_jax.demo.train --out locft_jax/demo/model      (2 CPU cores: under an hour)

The tokenizer is a byte-level BPE trained on the same sentences, so it accepts any text. Every
sentence ends with EOS and is a segment of its own: nothing is learned across sentences.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from locft_jax.data.packing import Batch, Corpus, corpus_from_lists, fit_shape, pack
from locft_jax.demo.world import capability_items, make_world, prompts, training_texts
from locft_jax.model import decoder
from locft_jax.model.spec import ModelSpec, parse_spec
from locft_jax.model.weights import Params, Weights, init_weights, take_tensor, weight_table

EOS = "<|endoftext|>"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "vocab_size": 1500,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
SENTENCES = 430  # a step, about 4,096 tokens
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 100, 0.1


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of `vocab_size` entries, EOS = id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def lm_corpus(tokenizer: Tokenizer, texts: list[str]) -> Corpus:
    """Sentences + EOS, every token but the first a target."""
    parts = [[*e.ids, tokenizer.token_to_id(EOS)] for e in tokenizer.encode_batch(texts)]
    return corpus_from_lists(parts, np.ones(len(parts)))


def batch_logits(spec: ModelSpec, weights: Weights, tokens: jax.Array, batch: Batch) -> jax.Array:
    """Logits [M, V] at the batch's targets."""
    params = Params(spec, weights)
    x = decoder.embed(params, tokens[batch.index])
    return decoder.head(params, decoder.hidden_at_targets(params, x, batch.rows, batch.targets))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(
    spec: ModelSpec, optimizer: Any, weights: Weights, state: Any, tokens: jax.Array, batch: Batch
) -> tuple[Weights, Any, jax.Array]:
    """One AdamW step on the mean cross-entropy a token; returns weights, state, loss."""

    def loss_of(weights: Weights) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            batch_logits(spec, weights, tokens, batch), batch.labels
        )
        return jnp.sum(losses * batch.weight)

    loss, grads = jax.value_and_grad(loss_of)(weights)
    updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state, loss


@functools.partial(jax.jit, static_argnums=0)
def correct_targets(spec: ModelSpec, weights: Weights, tokens: jax.Array, batch: Batch) -> jax.Array:
    """Whether each target [M] is the arg-max."""
    return jnp.argmax(batch_logits(spec, weights, tokens, batch), -1) == batch.labels


def recall(
    spec: ModelSpec, weights: Weights, tokenizer: Tokenizer, pairs: list[tuple[str, str]]
) -> np.ndarray:
    """Whether the model answers each (prompt, answer) exactly, EOS included: [N] bool."""
    heads = [len(e.ids) for e in tokenizer.encode_batch([p for p, _ in pairs])]
    corpus = lm_corpus(tokenizer, [f"{p} {a}" for p, a in pairs])
    corpus = dataclasses.replace(corpus, target_start=np.asarray(heads, np.int64))
    right = np.zeros(len(pairs), bool)
    chunks = np.array_split(np.arange(len(pairs)), max(1, len(pairs) // SENTENCES))
    shape = fit_shape(corpus, chunks, 128)
    for which in chunks:
        batch = pack(corpus, which, shape)
        assert batch is not None
        hit = np.asarray(correct_targets(spec, weights, corpus.tokens, batch))
        right[which] = True
        right[which[batch.example[(batch.example >= 0) & ~hit]]] = False
    return right


def save_model(out: Path, spec: ModelSpec, weights: Weights, tokenizer: Tokenizer) -> None:
    """An ordinary Hugging Face folder: config, safetensors, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    names = [n for row in weight_table(spec).values() for n in row.names()]
    tensors = {n: np.asarray(take_tensor(Params(spec, weights), n)) for n in names}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    files: dict[str, Any] = {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Train, report what the model recalls, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    world = make_world(args.seed)
    texts = training_texts(world)
    tokenizer = train_tokenizer(texts)
    corpus = lm_corpus(tokenizer, texts)
    spec = parse_spec(CONFIG)
    weights = init_weights(spec, jax.random.key(args.seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARM_UP, args.steps, LEARNING_RATE / 100)
    matrices = lambda w: {k: "norm" not in k for k in w}  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices),
    )
    state = optimizer.init(weights)
    tokens = jnp.asarray(corpus.tokens)
    rng = np.random.default_rng(args.seed)
    per_epoch = -(-len(corpus) // SENTENCES)
    orders = [rng.permutation(len(corpus)) for _ in range(-(-args.steps // per_epoch))]
    batches = [o[i : i + SENTENCES] for o in orders for i in range(0, len(o), SENTENCES)][: args.steps]
    shape = fit_shape(corpus, batches, 128)
    begin = time.time()
    for step, which in enumerate(batches, 1):
        batch = pack(corpus, which, shape, "token")
        weights, state, loss = train_step(spec, optimizer, weights, state, tokens, batch)
        if step % 50 == 0 or step == args.steps:
            spent = time.time() - begin
            left = spent / step * (args.steps - step)
            print(
                f"step {step}/{args.steps}  loss {float(loss):.3f}  {spent:.0f} s, {left:.0f} s left",
                flush=True,
            )
    pairs = [(p, f.answer) for f in world.facts for p in prompts(f)]
    skills = [(s["prompt"], s["answer"]) for s in capability_items(world)]
    by_phrasing = recall(spec, weights, tokenizer, pairs).reshape(-1, 5).mean(0)
    print("facts recalled in each phrasing:", np.round(by_phrasing, 4).tolist())
    print("skills:", recall(spec, weights, tokenizer, skills).mean())
    save_model(args.out, spec, weights, tokenizer)


if __name__ == "__main__":
    main()

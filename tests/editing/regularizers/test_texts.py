"""The texts that an edit is to leave alone: where they come from, and what is refused or noted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax import Config
from locft_jax.data.requests import requests_from_records
from locft_jax.editing.regularizers.texts import (
    encode_retained,
    retained_texts,
    sample_model,
    template_texts,
    unused,
)
from locft_jax.model import decoder


def test_the_model_is_sampled_alike_every_time(model):
    first, second, other = (sample_model(model, seed, count=8, length=12) for seed in (0, 0, 1))
    assert first == second != other
    eos = model.tokenizer.eos_token_id
    assert all(s[0] == eos and 2 <= len(s) <= 12 and eos not in s[1:-1] for s in first)


def test_a_sampled_token_is_drawn_from_the_models_distribution(model):
    texts = sample_model(model, 0, count=3000, length=2)
    seen = np.bincount([t[1] for t in texts], minlength=model.spec.vocab_size) / len(texts)
    start = jnp.asarray([[model.tokenizer.eos_token_id]])
    want = jax.nn.softmax(decoder.logits(model.params, start)[0, 0])
    assert np.abs(seen - np.asarray(want)).sum() < 0.35  # about 0.2 is chance here; uniform gives > 1


def test_templates_show_no_known_subject():
    names = [("Hana", "Orvik"), ("Mira", "Halver"), ("Tovin", "Selt"), ("Ketil", "Brask")]
    records = [
        {"prompt": f"The sign of {a} {b} is", "target_new": "red", "subject": f"{a} {b}"} for a, b in names
    ]
    requests = requests_from_records(records, None, "keep").requests
    texts = template_texts(requests, seed=0)
    assert len(texts) == 4 * len(records) and texts == template_texts(requests, seed=0)
    known = {word for name in names for word in name}
    for text in texts:
        assert text.startswith("The sign of ") and text.endswith(" is")
        assert not known & set(text.split())


def test_files_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n\nanother\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one text"}\n{"prompt": "another", "answer": "x"}\n')
    for name in ("a.txt", "b.jsonl"):
        config = Config(preserve="soft", preserve_data=str(tmp_path / name))
        assert retained_texts(config, []) == ["one text", "another"]


def test_of_a_long_prompt_the_end_is_kept(model):
    config = Config(preserve="soft", preserve_tokens="last", preserve_data="prompts.txt")
    texts = ["a b " * model.spec.max_position + "c"]
    (whole,) = model.tokenizer(texts, add_special_tokens=False).input_ids
    assert len(whole) > model.spec.max_position
    (ids,) = encode_retained(model.tokenizer, model.spec, config, texts)
    assert ids == whole[-model.spec.max_position :]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, ["preserve_strength", "preserve_data", "preserve_tokens"]),
        ({"preserve_kl": 1}, ["preserve_strength"]),
        ({"preserve": "soft"}, []),
    ],
)
def test_notes_on_what_preserves_nothing(changes, keys):
    config = Config(preserve_strength=3, preserve_data="templates", preserve_tokens="last", **changes)
    assert [note.split("`")[1].split(":")[0] for note in unused(config)] == keys
    assert unused(Config(**changes)) == []

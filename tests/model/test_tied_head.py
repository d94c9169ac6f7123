"""A tied head is the embedding, also where the embedding is edited."""

import jax
import numpy as np
import pytest

from locft_jax.model import decoder
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import Params, init_weights

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("tied", [True, False])
def test_an_edited_embedding_is_the_head_where_they_are_tied(tied):
    spec = parse_spec({**CONFIG, "tie_word_embeddings": tied})
    weights = init_weights(spec, jax.random.key(0))
    table = jax.random.normal(jax.random.key(1), weights["embed"].shape)
    tokens = np.arange(6)[None]
    edited = decoder.logits(Params(spec, weights, {"model.embed_tokens.weight": table}), tokens)
    replaced = decoder.logits(Params(spec, weights | {"embed": table}), tokens)
    np.testing.assert_allclose(edited, replaced, rtol=1e-6, atol=1e-6)

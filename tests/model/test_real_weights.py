"""A real pretrained model: stories260K, where the shared data is present."""

import json

import jax
import numpy as np
import pytest

from locft_jax.evaluation.verify import Prompts, answer
from locft_jax.io.hf_load import load_model
from locft_jax.model import decoder


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data / "stories260K"
    model = load_model(str(folder), mesh={"data": 1, "model": 1})
    return model, json.loads((folder / "golden.json").read_text())


def test_golden_logits(stories):
    model, golden = stories
    out = jax.jit(decoder.logits)(model.params, np.asarray([golden["prompt_tokens"]]))
    # torch in float32 agrees with the golden values to 5e-6; logits reach 14 in size.
    np.testing.assert_allclose(out[0, -1, :16], golden["last_logits_first16"], atol=5e-5, rtol=0)


def test_golden_text(stories):
    model, golden = stories
    stop = np.zeros(model.spec.vocab_size, bool)
    new = len(model.tokenizer(golden["greedy_text"])["input_ids"]) - len(golden["prompt_tokens"])
    (said,), _ = answer(model, Prompts([golden["prompt_tokens"]], [[]], new, stop))
    text = model.tokenizer.decode(golden["prompt_tokens"] + said, skip_special_tokens=True)
    assert text == golden["greedy_text"]

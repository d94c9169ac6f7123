"""Further training texts: which they are, that those of one edit weigh as one edit, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax import Config, UserError, edit, load_model
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit_command
from locft_jax.data.packing import corpus_from_lists, fit_shape, pack
from locft_jax.data.requests import read_requests
from locft_jax.editing.augment import STAND_IN, prefix_texts, training_prompts, written_prefixes
from locft_jax.editing.run import encode_requests
from locft_jax.editing.step import batch_loss
from locft_jax.evaluation.probes import make_probes
from locft_jax.model.activation_cache import Inputs

ONE = {"data": 1, "model": 1}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh=ONE)


@pytest.fixture(scope="module")
def requests(edits_file):
    return read_requests(str(edits_file)).requests


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "prefixes.txt"
    path.write_text("Long ago.\n\nIt rains. \nTen plus five is 15.\nLong ago.\n")
    return path


def test_an_edits_prompts_are_its_own_its_rephrases_and_different_texts_before_it(requests, texts_file):
    config = Config(augment_prefixes=2, augment_data=str(texts_file), augment_rephrases=1, seed=3)
    pool = prefix_texts(config)
    assert pool == ["Long ago.", "It rains.", "Ten plus five is 15."]
    found = training_prompts(requests, config, pool)
    assert len(found) == len(requests)
    for r, (own, *more) in zip(requests, found, strict=True):
        assert own == r.prompt
        assert more[: len(r.rephrases[:1])] == list(r.rephrases[:1])
        begun = more[len(r.rephrases[:1]) :]
        assert len(set(begun)) == 2 and all(t in {f"{p} {r.prompt}" for p in pool} for t in begun)
    assert found == training_prompts(requests, config, pool)
    assert found != training_prompts(requests, dataclasses.replace(config, seed=4), pool)


def test_rephrases_that_are_trained_are_not_asked(requests):
    asked = [p.prompt for p in make_probes(requests, trained=1) if p.kind == "generalization"]
    assert asked == [text for r in requests for text in r.rephrases[1:]]
    assert len(asked) < sum(len(r.rephrases) for r in requests)


def test_the_model_writes_seeded_texts_that_differ(model):
    config = Config(augment_prefixes=3)
    found = written_prefixes(model, config)
    assert (
        found
        == written_prefixes(model, config)
        != written_prefixes(model, Config(augment_prefixes=3, seed=1))
    )
    assert len(set(found)) == len(found) >= 3 and all(text.endswith(".") for text in found)
    assert prefix_texts(config) == [STAND_IN] * 3
    assert prefix_texts(Config()) == written_prefixes(model, Config()) == []


@pytest.mark.parametrize("average", ["example", "token"])
def test_the_texts_of_an_edit_weigh_as_one_edit(model, requests, texts_file, average):
    """The loss of a batch of two edits against those of its texts, each packed by itself."""
    config = Config(augment_prefixes=2, augment_data=str(texts_file), augment_rephrases=1)
    corpus = encode_requests(model.tokenizer, requests, config, model.spec)
    assert corpus.edits == len(requests) < len(corpus)
    edits = np.array([3, 1])
    which = corpus.examples_of(edits)
    assert corpus.edit[which].tolist() == sorted(corpus.edit[which], key=edits.tolist().index)
    counts = [int((corpus.edit == e).sum()) for e in edits]

    shape, compiled = fit_shape(corpus, [which], 64), jax.jit(batch_loss)

    def loss(corpus, which):
        inputs = Inputs(jnp.asarray(corpus.tokens), 0)
        return float(compiled({}, model.params, inputs, pack(corpus, which, shape, average)))

    alone = dataclasses.replace(corpus, edit=None)
    losses = [[loss(alone, np.array([i])) for i in corpus.examples_of(np.array([e]))] for e in edits]
    if average == "example":
        expected = np.mean([np.mean(own) for own in losses])
    else:  # a text's mean is over its own tokens
        shares = [[corpus.target_lengths[i] / n for i in corpus.examples_of(np.array([e]))]
                  for e, n in zip(edits, counts, strict=True)]  # fmt: skip
        expected = np.average(np.concatenate(losses), weights=np.concatenate(shares))
    assert loss(corpus, which) == pytest.approx(expected, rel=1e-5)


def test_without_further_texts_a_corpus_is_its_examples():
    corpus = corpus_from_lists([[1, 2, 3], [4, 5]], [1, 1])
    assert corpus.edits == 2
    assert corpus.examples_of(np.array([1, 0])).tolist() == [1, 0]


def test_an_edit_counts_edits_and_not_texts(model, requests):
    config = Config(
        num_steps=2, batch_size=4, augment_prefixes=2, augment_rephrases=1, layer=1, evaluate=False
    )
    result = edit(model, requests, config)
    assert sum(s["examples"] for s in result.steps) == 2 * len(requests)
    plain = edit(model, requests, dataclasses.replace(config, augment_prefixes=0, augment_rephrases=0))
    assert len(plain.steps) == len(result.steps)
    assert plain.steps[0]["tokens"] < result.steps[0]["tokens"] / 2
    again = edit(model, requests, config)
    assert all(np.array_equal(again.delta.new[n], a) for n, a in result.delta.new.items())


@pytest.mark.parametrize(
    ("content", "setting", "told"),
    [
        (None, "3", "cannot be read"),
        (b"\xff\xfe", "3", "UTF-8"),
        (b"One.\n\nOne.\nTwo.\n", "3", "holds 2 different texts"),
    ],
)
def test_a_file_of_texts_that_will_not_do(content, setting, told, tmp_path, edit_arguments, capsys):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    arguments = edit_arguments(out, augment_prefixes=setting, augment_data=path)
    assert run_command(edit_command, arguments) == 2
    error = capsys.readouterr().err
    assert "augment_data" in error and told in error and not out.exists()


def test_a_prompt_too_long_with_a_text_before_it_is_refused_before_loading(model, requests):
    def fits(count):
        long = dataclasses.replace(requests[0], prompt="five " * count + "five")
        try:
            return encode_requests(model.tokenizer, [long], Config(), model.spec) and long
        except UserError:
            return None

    long = next(fits(n) for n in range(400) if not fits(n + 1))  # the longest that has room by itself
    assert len(long.prompt) > 200
    with pytest.raises(UserError, match="context"):
        encode_requests(model.tokenizer, [long], Config(augment_prefixes=1), model.spec)

"""prepare: what is wrong is found before weights are loaded, texts are tokenized once, configs share."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from locft_jax import Config, UserError, load_model, prepare
from locft_jax.cli.edit import main as edit
from locft_jax.data.requests import read_requests
from locft_jax.data.tokenize import TextEncoder
from locft_jax.editing import hooks
from locft_jax.evaluation.probes import Probe
from locft_jax.io import hf_load
from locft_jax.prepare import Base, Opened, no_site


@pytest.fixture
def config(edit_arguments, tmp_path):
    """The config of `edit_run`."""
    _, _, _, *pairs = edit_arguments(tmp_path / "out")
    from locft_jax.config import load_config

    return load_config(None, pairs)


@pytest.fixture
def counted(monkeypatch):
    """How often each text, with and without special tokens, goes through a tokenizer; texts of each call."""
    texts, calls = collections.Counter(), []
    load = hf_load.load_tokenizer

    def counting(folder):
        tokenizer = load(folder)

        class Counting(type(tokenizer)):
            def __call__(self, given, *args, **options):
                texts.update((text, options.get("add_special_tokens", True)) for text in given)
                calls.append(len(given))
                return super().__call__(given, *args, **options)

        tokenizer.__class__ = Counting
        return tokenizer

    monkeypatch.setattr(prepare, "load_tokenizer", counting)
    return texts, calls


def test_every_text_of_a_run_is_tokenized_once(counted, edit_arguments, tmp_path):
    """A whole run through the command, with probes, choices, retained texts and prefixes."""
    texts, calls = counted
    (tmp_path / "kept.txt").write_text("The capital of Oredal is Vintown.\nThe sign of Orvik is\n")
    changes = {"num_steps": 2, "preserve_kl": 1, "preserve_data": tmp_path / "kept.txt", "export": "delta"}
    edit(edit_arguments(tmp_path / "out", **changes, eval_every=1, augment_rephrases=1))
    assert not {text: n for text, n in texts.items() if n > 1} and len(texts) > 50
    assert ("The sign of Orvik is", True) in texts and ("The sign of Orvik is red", True) in texts
    assert len(calls) <= 12


def test_a_text_encoder_gives_the_tokenizers_ids(tiny_model_dir):
    tokenizer = hf_load.load_tokenizer(Opened().folder(str(tiny_model_dir)))
    encoder, texts = TextEncoder(tokenizer), ["a b", "Oredal", "a b", ""]
    for special in (True, False):
        ids = tokenizer(texts, add_special_tokens=special)["input_ids"]
        assert encoder.ids(texts, special) == ids == encoder.ids(texts[::-1], special)[::-1]
    assert encoder.ids([]) == []


def test_nothing_is_loaded_and_the_run_is_described(config, monkeypatch):
    monkeypatch.setattr(prepare, "load_opened", lambda *args: pytest.fail("weights were loaded"))
    got = prepare.prepare(config)
    assert got.site == tuple(f"model.layers.2.mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
    assert got.corpus.edits == len(got.data.requests) == 12 and got.retained == [] and got.notes == []
    assert len(got.questions.probes) == len(got.questions.prompts) > 12 + len(got.capability)
    identity = got.identity()
    assert json.loads(json.dumps(identity)) == identity and identity["site"] == list(got.site)
    assert prepare.prepare(config).identity() == identity
    assert prepare.prepare(dataclasses.replace(config, seed=1)).identity() != identity
    quiet = prepare.prepare(dataclasses.replace(config, evaluate=False))
    assert quiet.questions is None and quiet.corpus.edits == 12


def test_what_is_edited_and_asked_is_for_the_caller_to_say(config):
    nothing = prepare.prepare(dataclasses.replace(config, evaluate=False), sites=no_site)
    assert nothing.sites == () == nothing.site and nothing.corpus is None and nothing.retained == []
    assert nothing.questions is not None  # what edits nothing asks

    sites = [(f"model.layers.{i}.mlp.up_proj.weight",) for i in (0, 1)]
    many = prepare.prepare(config, sites=lambda spec, config: sites)
    assert len(many.sites) == 2 and many.site == () and many.corpus.edits == 12

    asked = prepare.prepare(
        dataclasses.replace(config, data_path=None),
        probes=[Probe("0", "ask", "The sign of Mira is", None)],
        sites=no_site,
    )
    tokenizer = asked.tokenizer
    assert asked.questions.prompts == tokenizer(["The sign of Mira is"])["input_ids"]
    assert asked.data.requests == [] and asked.capability == []


def test_a_loaded_model_and_one_that_is_only_planned(config, tiny_model_dir):
    model = load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})
    data = read_requests(config.data_path)
    loaded = prepare.prepare(dataclasses.replace(config, data_path=None), data=data, base=Base.loaded(model))
    assert loaded.load() is model and loaded.complete(model).retained == []
    own = prepare.prepare(config)
    np.testing.assert_array_equal(loaded.corpus.tokens, own.corpus.tokens)
    assert loaded.questions.prompts == own.questions.prompts

    planned = prepare.prepare(config, base=Base(model.spec), data=data, capability=[])
    assert planned.site == own.site and planned.corpus is None and planned.questions is None


def test_texts_that_the_model_is_to_write_come_when_it_is_loaded(config):
    config = dataclasses.replace(config, preserve_kl=1.0, augment_prefixes=1, num_edits=2)
    looked = prepare.prepare(config)
    assert looked.retained is None
    whole = looked.complete(looked.load())
    assert len(whole.retained) == 512 and whole.corpus.edits == 2 and len(whole.corpus) == 4
    assert not np.array_equal(whole.corpus.tokens, looked.corpus.tokens)


def test_configs_share_what_they_open(config, counted):
    texts, _ = counted
    opened = Opened()
    first = prepare.prepare(config, opened=opened)
    count = sum(texts.values())
    second = prepare.prepare(dataclasses.replace(config, seed=3, layer=1), opened=opened)
    assert second.folder is first.folder and second.data is first.data and second.tokenizer is first.tokenizer
    assert sum(texts.values()) == count > 0 and second.site != first.site


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data_path": None}, "data_path: no edits given"),
        ({"data_path": "nowhere.json"}, "nowhere.json"),
        ({"layer": 3}, "out of range"),
        ({"rewrite_module": "h.{}.mlp"}, "matches no tensor"),
        ({"capability_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"chat_template": True}, "no chat template"),
        ({"preserve": "soft", "rewrite_module": "model.embed_tokens"}, "matrices of layers only"),
        ({"preserve": "soft", "preserve_data": "nowhere.txt"}, "preserve_data: nowhere.txt"),
        ({"augment_prefixes": 1, "augment_data": "nowhere.txt"}, "augment_data: nowhere.txt"),
        ({"memory_budget": 1e-9, "activation_cache": "device"}, "activation_cache: device needs"),
        ({"mesh": {"data": 1, "model": 3}}, "mesh"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_weights_load(config, monkeypatch, changes, says):
    monkeypatch.setattr(prepare, "load_opened", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(UserError) as error:
        prepare.prepare(dataclasses.replace(config, **changes))
    assert says in str(error.value)


def test_a_reporter_that_is_not_installed_is_refused_before_weights_load(monkeypatch):
    monkeypatch.setattr(hooks, "REPORTERS", {"wandb": "no_such_package"})
    with pytest.raises(UserError, match="wandb needs a package: pip install no_such_package"):
        prepare.prepare(Config(model_name_or_path="nowhere", report_to="wandb"))

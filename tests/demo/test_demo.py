"""The bundled demo: the model knows its world, the scripts make what is shipped, and train."""

import dataclasses
import json
import re

import numpy as np

from locft_jax import Config, evaluate, load_model
from locft_jax.config import DEMO_CONFIG, DEMO_FOLDER, load_config
from locft_jax.data.capability import read_capability
from locft_jax.demo import train
from locft_jax.demo.world import capability_items, make_edits, make_world, prompts
from locft_jax.io.hf_folder import open_folder


def test_the_shipped_files_are_what_the_generator_makes():
    world = make_world()
    edits = [json.loads(line) for line in (DEMO_FOLDER / "edits.jsonl").read_text().splitlines()]
    skills = [json.loads(line) for line in (DEMO_FOLDER / "skills.jsonl").read_text().splitlines()]
    assert edits == make_edits(world)
    assert skills == capability_items(world)
    assert len(edits) >= 200


def test_the_model_is_small_and_ordinary():
    checkpoint = open_folder(str(DEMO_FOLDER / "model"))
    assert checkpoint.config == {k: v for k, v in train.CONFIG.items()}
    parameters = sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values())
    assert parameters <= 6_000_000
    assert sum(f.stat().st_size for f in checkpoint.path.iterdir()) <= 12 * 2**20


def test_it_recalls_its_facts_in_every_phrasing_and_accepts_any_text():
    model = load_model(str(DEMO_FOLDER / "model"), mesh={"data": 1, "model": 1})
    facts = make_world().facts[::12]  # every relation; all of them are asked by `make demo`
    records = [
        {"case_id": f"phrasing {i}", "prompt": prompt, "target_new": f.answer}
        for f in facts
        for i, prompt in enumerate(prompts(f))
    ]
    skills = read_capability(str(DEMO_FOLDER / "skills.jsonl"))[::10]
    report, lines = evaluate(model, records, skills, Config(row_length=64))
    for i in range(5):
        own = [line for line in lines if line["case"] == f"phrasing {i}"]
        # By the letter, without the scorer: the demo's answers have no article and no capital to fold.
        right = [line["after"] == line["target"] for line in own]
        assert len(own) == len(facts) and np.mean(right) >= 0.95, (i, own)
        assert right == [line["correct"] for line in own]
    assert report["figures"]["capability"] >= 0.95
    text = "Zoë 東京 🎲\t\x00 ~ never seen"
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text


def test_the_demo_config_edits_200_facts():
    config = load_config(None)
    assert config.source == str(DEMO_CONFIG)
    assert config.name == "demo"
    assert (DEMO_FOLDER / "edits.jsonl").samefile(config.data_path)


def test_training_from_scratch_learns(tmp_path, monkeypatch, capsys):
    """A small model and a twentieth of the world: what it says it recalls, the saved folder recalls."""
    world = make_world()
    small = dataclasses.replace(world, facts=world.facts[::40], skills=world.skills[::40])
    monkeypatch.setattr(train, "make_world", lambda seed: small)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 600}
    monkeypatch.setattr(train, "CONFIG", train.CONFIG | sizes | {"head_dim": 4})
    monkeypatch.setattr(train, "WARM_UP", 1)
    monkeypatch.setattr(train, "LEARNING_RATE", 2e-2)
    train.main(["--out", str(tmp_path / "model"), "--steps", "60"])
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+/60  loss ([\d.]+)", said)]
    assert len(losses) == 2 and losses[1] < losses[0] < 0.5 * np.log(600)
    recalled = json.loads(re.search(r"in each phrasing: (\[.*\])", said)[1])
    model = load_model(str(tmp_path / "model"), mesh={"data": 1, "model": 1})
    assert model.spec.n_layers == 2
    records = [{"prompt": prompts(f)[0], "target_new": f.answer} for f in small.facts]
    report, _ = evaluate(model, records, [], Config(row_length=64))
    assert round(report["figures"]["reliability"], 4) >= recalled[0] > 0.2  # a recalled one ends with EOS too

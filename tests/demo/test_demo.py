"""The bundled demo: the model knows its world, the scripts make what is shipped, and train."""

import json

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
    for phrasing in range(5):
        records = [{"prompt": prompts(f)[phrasing], "target_new": f.answer} for f in facts]
        skills = read_capability(str(DEMO_FOLDER / "skills.jsonl"))[::10] if phrasing == 0 else []
        report, lines = evaluate(model, records, skills, Config(row_length=64))
        assert report["figures"]["reliability"] >= 0.95, (
            phrasing,
            [l for l in lines if not l["correct"]][:3],
        )
        if skills:
            assert report["figures"]["capability"] >= 0.95
    text = "Zoë 東京 🎲\t\x00 ~ never seen"
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text


def test_the_demo_config_edits_200_facts():
    config = load_config(None)
    assert config.source == str(DEMO_CONFIG)
    assert config.name == "demo"
    assert (DEMO_FOLDER / "edits.jsonl").samefile(config.data_path)


def test_training_from_scratch_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.CONFIG, "hidden_size", 32)
    monkeypatch.setitem(train.CONFIG, "intermediate_size", 32)
    monkeypatch.setitem(train.CONFIG, "num_hidden_layers", 2)
    monkeypatch.setattr(train, "SENTENCES", 2000)
    monkeypatch.setattr(train, "WARM_UP", 1)
    train.main(["--out", str(tmp_path / "model"), "--steps", "4"])
    said = capsys.readouterr().out
    assert "step 4/4" in said and "facts recalled" in said
    checkpoint = open_folder(str(tmp_path / "model"))
    assert checkpoint.spec.n_layers == 2

"""Which sites are tried, in which order, and what a smaller sibling says."""

import dataclasses
import json

import pytest

from locft_jax.errors import UserError
from locft_jax.model.spec import parse_spec
from locft_jax.studies.locate.places import MODULES, STUDIED, make_plan, transfer
from locft_jax.studies.rule import best

SPEC = parse_spec(
    {
        "model_type": "qwen2",  # with biases
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)


def plan(modules=None, layers=None, strategy="all", sibling=None):
    return make_plan(SPEC, modules, layers, strategy, sibling)


def test_every_layer_with_the_modules_studied_from_below():
    [(name, places)] = plan().rounds([])
    assert (name, len(places)) == ("locating", 80)
    assert [p.key for p in places[:6]] == [*((0, m) for m in STUDIED), (1, "entire")]
    sizes = {p.module: len(p.tensors) for p in plan(list(MODULES), [3]).all()}
    assert sizes == {"entire": 12, "attention": 7, "mlp": 3} | dict.fromkeys(
        ("up", "down", "gate", "q", "k", "v", "o"), 1
    )


def test_templates_and_layers_can_be_named():
    norm = "model.layers.{}.input_layernorm"
    places = plan([norm, "k", "k"], [4, 2, 4]).all()
    assert [p.key for p in places] == [(2, norm), (2, "k"), (4, norm), (4, "k")]
    assert places[0].tensors == ("model.layers.2.input_layernorm.weight",)


@pytest.mark.parametrize(
    ("modules", "layers", "message"),
    [
        (["donw"], None, "--modules: 'donw' is no module; name any of entire attention"),
        (["model.layers.3.mlp"], None, "a template with {}"),
        (["model.layers.{}.mlp!"], None, "--modules: .*is not valid"),
        (["model.layers.{}.router"], None, "matches no tensor"),
        (None, [16], "layer: 16 is out of range"),
        (None, [-1], "layer: -1 is out of range"),
    ],
)
def test_what_the_model_lacks_is_refused(modules, layers, message):
    with pytest.raises(UserError, match=message):
        plan(modules, layers).all()


def table_with_peak(layer, module):
    """A figure for every place that falls with the distance from a peak."""

    def line(place):
        far = abs(place.layer - layer) + (place.module != module)
        rates = {"reliability": 1.0, "generalization": 0.5, "capability": 1 - far / 50}
        rest = {"locality_agreement": None, "locality": None, "parameters": 1, "rewrite_module": ""}
        return {"layer": place.layer, "module": place.module, **rates, **rest}

    return line


@pytest.mark.parametrize("peak", [0, 5, 9, 14, 15])
def test_coarse_finds_the_same_best_with_fewer_sites(peak):
    measure, lines = table_with_peak(peak, "up"), []
    coarse = plan(["mlp", "up", "down"], strategy="coarse")
    for _, places in coarse.rounds(lines):
        lines += map(measure, places)
    every = [measure(p) for p in coarse.all()]
    assert best(lines) == best(every) and best(lines)["layer"] == peak
    assert len({(x["layer"], x["module"]) for x in lines}) == len(lines) < len(every) / 2
    assert "then the layers around the best" in coarse.size()


def test_coarse_over_few_layers_is_all_of_them():
    [(_, places)] = plan(["up"], [3, 4], "coarse").rounds([])
    assert [p.layer for p in places] == [3, 4]


def write_sibling(path, layer, layers, module="down"):
    path.write_text(json.dumps({"layers": layers, "recommendation": {"layer": layer, "module": module}}))
    return path


@pytest.mark.parametrize(
    ("layer", "layers", "here", "expected"),
    [(6, 28, 80, 19), (6, 28, 28, 6), (22, 32, 32, 22), (0, 4, 2, 0), (3, 4, 80, 79)],  # method.md: 72B
)
def test_relative_depth_of_a_sibling(tmp_path, layer, layers, here, expected):
    assert transfer(write_sibling(tmp_path / "sites.json", layer, layers), here) == ("down", expected)


def test_a_sibling_gives_one_site(tmp_path):
    [(_, [place])] = plan(sibling=write_sibling(tmp_path / "sites.json", 6, 28)).rounds([])
    assert place.tensors == ("model.layers.3.mlp.down_proj.weight",)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"layers": 3, "recommendation": {"layer": 3, "module": "up"}}']
)
def test_a_file_that_is_no_table_of_sites_is_refused(tmp_path, text):
    path = tmp_path / "sites.json"
    with pytest.raises(UserError, match="--from-sibling: .* cannot be used .*No such file"):
        plan(sibling=path)
    path.write_text(text)
    with pytest.raises(UserError, match="--from-sibling"):
        plan(sibling=path)


def test_plans_are_told_apart():
    plans = plan(), plan(["up"]), plan(layers=[1]), plan(strategy="coarse")
    found = [json.dumps(p.describe()) for p in plans]
    assert len(set(found)) == 4
    assert dataclasses.replace(plan(), every=1).describe() == plan().describe()

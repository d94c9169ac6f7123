"""The pictures are written and show something."""

import numpy as np
import pytest
from matplotlib.image import imread

from locft_jax.studies.locate.figure import draw_curves, draw_heat_maps
from locft_jax.studies.locate.rule import worth_showing

BEFORE = {"reliability": 0.0, "generalization": 0.0, "locality": 1.0, "capability": 1.0}


def table(layers, modules=("entire", "down"), **fixed):
    rng = np.random.default_rng(0)
    keys = ("reliability", "generalization", "locality", "locality_agreement", "capability")
    return [
        {"layer": l, "module": m, **{k: rng.uniform(0.5, 1) for k in keys}, **fixed}
        for l in layers
        for m in modules
    ]


def ink(path):
    """Share of the pixels that are not white."""
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 200
    return float((picture < 0.99).any(axis=-1).mean())


@pytest.mark.parametrize("layers", [range(8), [3], range(0, 80, 2)])
def test_pictures_are_not_blank(tmp_path, layers):
    lines = table(layers)
    draw_curves(lines, BEFORE, "a title", tmp_path / "curves.png")
    draw_heat_maps(lines, (layers[0], "down"), "a title", tmp_path / "heatmap.png")
    assert 0.01 < ink(tmp_path / "curves.png") < 0.5
    assert 0.2 < ink(tmp_path / "heatmap.png") < 0.95


def test_what_was_not_measured_has_no_panel(tmp_path):
    lines = table(range(3), capability=None, locality=None)
    lines[0] |= dict.fromkeys(("reliability", "generalization", "locality_agreement"))  # its edit failed
    assert worth_showing(lines) == ["reliability", "generalization", "locality_agreement"]
    draw_curves(lines, {}, "a title", tmp_path / "curves.png")
    draw_heat_maps(lines, (1, "down"), "a title", tmp_path / "heatmap.png")
    assert ink(tmp_path / "curves.png") and ink(tmp_path / "heatmap.png")


def test_the_same_figure_is_drawn_once():
    lines = [line | {"locality_agreement": line["locality"]} for line in table(range(2))]
    assert worth_showing(lines) == ["reliability", "generalization", "locality", "capability"]


def test_pictures_show_the_figures(tmp_path):
    """Other figures, other pictures."""
    for name, lines in (("a", table(range(4))), ("b", table(range(4), capability=0.2))):
        draw_heat_maps(lines, (0, "down"), "a title", tmp_path / f"{name}.png")
    assert not np.array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))

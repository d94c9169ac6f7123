"""The pictures by what is in them: panels, labels, and the numbers that are drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from locft_jax.studies import figures
from locft_jax.studies.tables import FIGURES, worth_showing

BEFORE = {"reliability": 0.0, "generalization": 0.0, "locality": 1.0, "capability": 1.0}
ALL = list(FIGURES)


def table(layers, modules=("entire", "down"), **fixed):
    rng = np.random.default_rng(0)
    return [
        {"layer": l, "module": m, **{k: rng.uniform(0.5, 1) for k in FIGURES}, **fixed}
        for l in layers
        for m in modules
    ]


def row(settings, spread=None, **rates):
    given = {key: rates.get(key) for key in FIGURES}
    return {"settings": settings, **given, **{f"{key}_spread": spread for key in FIGURES}}


def panels(figure):
    """Title -> axes of the panels that show something."""
    return {a.get_title(): a for a in figure.axes if a.get_visible() and a.get_title()}


def points(axis):
    """The (x, y) points of every line that is neither one point nor level, in the order they were drawn."""
    lines = [np.round(line.get_xydata().astype(float), 9).tolist() for line in axis.lines]
    return [line for line in lines if len({y for _, y in line}) > 1]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture(autouse=True)
def no_window():
    """No figure is registered with pyplot, which would open windows and keep all of them."""
    yield
    assert plt.get_fignums() == []


@pytest.mark.parametrize("layers", [range(8), [3], range(0, 80, 2)])
def test_curves_over_the_layers(tmp_path, layers):
    lines = table(layers)
    figure = figures.draw_curves(lines, BEFORE, "a title")
    assert (figure.get_suptitle(), list(panels(figure))) == ("a title", [k.replace("_", " ") for k in ALL])
    assert legend(figure) == ["entire", "down", "unedited"]
    for key, axis in zip(ALL, panels(figure).values(), strict=True):
        curves = [line.get_xydata() for line in axis.lines if line.get_linestyle() == "-"][:2]
        for curve, module in zip(curves, ("entire", "down"), strict=True):
            expected = [[line["layer"], 100 * line[key]] for line in lines if line["module"] == module]
            np.testing.assert_allclose(curve, expected)
        level = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
        assert level == ([] if BEFORE.get(key) is None else [100 * BEFORE[key]])
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("layer", "%") and len(axis.get_xticks()) <= 16
    figure.savefig(tmp_path / "curves.png")
    assert plt.imread(tmp_path / "curves.png").shape[1] == figure.get_figwidth() * 110


@pytest.mark.parametrize("layers", [range(8), [3], range(0, 80, 2)])
def test_heat_maps_show_every_number_and_frame_the_site(layers):
    lines = table(layers)
    figure = figures.draw_heat_maps(lines, (layers[0], "down"), "a title")
    for key, axis in zip(ALL, panels(figure).values(), strict=True):
        assert axis.get_title() == f"{key.replace('_', ' ')}, %"
        cells = axis.collections[0].get_array().reshape(2, -1)
        assert np.allclose(cells[1], [100 * line[key] for line in lines if line["module"] == "down"])
        assert [t.get_text() for t in axis.get_yticklabels()] == ["entire", "down"]
        (frame,) = (patch for patch in axis.patches if isinstance(patch, Rectangle))
        assert frame.get_xy() == (0, 1)
        numbers = [text.get_text() for text in axis.texts]
        assert numbers == ([f"{value:.0f}" for value in cells.ravel()] if len(layers) <= 16 else [])


def test_what_was_not_measured_has_no_panel():
    lines = table(range(3), capability=None, locality=None)
    lines[0] |= dict.fromkeys(("reliability", "generalization", "locality_agreement"))  # its edit failed
    assert worth_showing(lines) == ["reliability", "generalization", "locality_agreement"]
    shown = ["reliability", "generalization", "locality agreement"]
    assert list(panels(figures.draw_curves(lines, {}, ""))) == shown
    figure = figures.draw_heat_maps(lines, (1, "down"), "")
    assert [len(axis.texts) for axis in panels(figure).values()] == [5, 5, 5]  # of 6 cells


def test_the_same_figure_is_drawn_once():
    lines = [line | {"locality_agreement": line["locality"]} for line in table(range(2))]
    assert worth_showing(lines) == ["reliability", "generalization", "locality", "capability"]


def test_a_difference_of_nothing_does_not_look_like_one():
    lines = [line | {"capability": 0.98 + 0.001 * line["layer"]} for line in table(range(4))]
    low, high = panels(figures.draw_curves(lines, {}, ""))["capability"].get_ylim()
    assert high - low == pytest.approx(5)
    shades = panels(figures.draw_heat_maps(lines, (0, "down"), ""))["capability, %"].collections[0]
    assert shades.norm.vmax - shades.norm.vmin == pytest.approx(5)


def test_a_sweep_over_numbers_is_curves_with_error_bars():
    rates = [1e-4, 1e-3, 1e-2]
    cells = [{"lr": lr, "pipeline": p} for p in ("a", "b") for lr in rates[::-1]]
    rows = [row(cell, 0.02, reliability=cell["lr"] * 10) for cell in cells]
    assert figures.horizontal(rows) == "lr"
    figure = figures.draw_sweep(rows, {"reliability": 0.5}, "a sweep")
    (axis,) = panels(figure).values()
    assert sorted(legend(figure)) == ["a", "b", "unedited"] and figure.get_suptitle() == "a sweep"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    assert (axis.get_xscale(), axis.get_xlabel(), axis.get_ylabel()) == ("log", "lr", "%")
    for bars in axis.containers:
        assert bars.lines[0].get_xydata().tolist() == [[lr, pytest.approx(1000 * lr)] for lr in rates]
        ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
        assert ends == [pytest.approx([1000 * lr - 2, 1000 * lr + 2]) for lr in rates]


def test_a_sweep_over_names_is_bars():
    rows = [row({"method": m}, None, reliability=r) for m, r in (("x", 0.25), ("y", None), ("z", 1.0))]
    assert figures.horizontal(rows) is None
    (axis,) = panels(figures.draw_sweep(rows, {"reliability": 0.5}, "")).values()
    assert [t.get_text() for t in axis.get_yticklabels()] == ["x", "y", "z"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first run on top
    assert [patch.get_width() for patch in axis.patches] == pytest.approx([25, np.nan, 100], nan_ok=True)
    assert [text.get_text() for text in axis.texts] == ["25.0", "", "100.0"]
    assert axis.lines[-1].get_xdata()[0] == 50


@pytest.mark.parametrize(
    ("settings", "across"),
    [
        ([{"lr": n, "on": bool(n)} for n in range(3)], "lr"),
        ([{"lr": n, "layer": m} for n in range(3) for m in range(4)], "layer"),
        ([{"lr": n} for n in range(2)], None),
        ([{"lr": None}, {"lr": 1}, {"lr": 2}, {"lr": 3}], None),
        ([{"lr": n, "data": str(m)} for n in range(3) for m in range(9)], None),  # too many curves
    ],
)
def test_what_is_on_the_horizontal_axis(settings, across):
    assert figures.horizontal([row(own) for own in settings]) == across


def test_dynamics_have_a_curve_a_fifth_and_one_for_all():
    look = lambda n: {"shards": [n / 4, 0, 1, None, 0.5], "figures": {"reliability": n / 8}}  # noqa: E731
    looks = [{"step": 10 * n, **look(n)} for n in (1, 2, 3)]
    lines = [{"settings": {"pipeline": "depth"}, "dynamics": looks}, {"settings": {}, "dynamics": []}]
    figure = figures.draw_dynamics(lines, "a title")
    (axis,) = panels(figure).values()
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("depth", "steps", "reliability, %")
    assert legend(figure) == [*(f"fifth {n} of the edits" for n in range(1, 6)), "all edits"]
    assert points(axis)[0] == [[10, 25], [20, 50], [30, 75]]
    assert points(axis)[-1] == [[10, 12.5], [20, 25], [30, 37.5]]


def frontier_row(reliability, generalization, agreement, capability=1.0, **settings):
    rates = {"locality": agreement, "locality_agreement": agreement, "capability": capability}
    return row(settings, reliability=reliability, generalization=generalization, **rates)


def test_a_frontier_joins_what_no_other_setting_of_the_method_beats():
    rows = [
        frontier_row(1.0, 0.92, 0.90),
        frontier_row(1.0, 0.95, 0.80),
        frontier_row(1.0, 0.85, 0.85),  # beaten
        frontier_row(1.0, 0.70, 0.99, preserve="soft"),
        frontier_row(0.99, 0.90, 0.95, preserve="soft"),
        frontier_row(None, None, None, preserve="null"),
    ]
    figure = figures.draw_frontier(rows, "a title")
    assert sorted(legend(figure)) == ["plain", "soft", "to use"] and len(figure.axes) == 4
    axis = figure.axes[2]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("locality agreement, %", "generalization, %")
    assert points(axis) == [[[80, 95], [90, 92]], [[95, 90], [99, 70]]]
    expected = [[100 * r["locality_agreement"], 100 * r["generalization"]] for r in rows[:5]]
    np.testing.assert_allclose(axis.collections[0].get_offsets(), expected)
    (ring,) = (line for line in axis.lines if line.get_label() == "to use")
    assert ring.get_xydata().tolist() == [pytest.approx([99, 70])] and axis.get_ylim()[0] >= 58


def test_a_frontier_without_a_figure_that_was_not_measured():
    rows = [frontier_row(1.0, None, 0.9, None), frontier_row(0.9, None, 0.95, None)]
    (axis,) = figures.draw_frontier(rows, "").axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("locality agreement, %", "reliability, %")

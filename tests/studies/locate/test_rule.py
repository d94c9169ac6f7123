"""The paper's rule on tables made up for it."""

import pytest

from locft_jax.studies.rule import best, ranked, recommend_site

BEFORE = {"capability": 0.9, "generalization": 0.0, "locality_agreement": None}


def line(layer, module, reliability, generalization, capability, agreement=0.5, parameters=100):
    return {
        "layer": layer,
        "module": module,
        "rewrite_module": f"model.layers.{{}}.{module}",
        "parameters": parameters,
        "reliability": reliability,
        "generalization": generalization,
        "locality": None,
        "locality_agreement": agreement,
        "capability": capability,
    }


TABLE = [
    line(0, "entire", 1.0, 0.95, 0.60),  # generalizes best, and costs most
    line(3, "down", 0.99, 0.70, 0.858),  # in half a point of the best capability
    line(4, "down", 1.0, 0.60, 0.860),  # the best capability of those that are reliable
    line(5, "down", 1.0, 0.80, 0.850),  # a whole point less
    line(6, "up", 0.98, 0.99, 0.90),  # not reliable enough
]


def site(line):
    return line["layer"], line["module"]


def test_capability_comes_first_among_the_reliable_then_generalization():
    assert site(best(TABLE)) == (3, "down")
    order = [site(found) for found in ranked(TABLE, 5)]
    assert order == [(3, "down"), (4, "down"), (5, "down"), (0, "entire"), (6, "up")]
    assert len(ranked(TABLE, 2)) == 2


def test_words_numbers_and_lines_to_paste():
    found = recommend_site(TABLE, BEFORE)
    assert found["config"] == "layer: 3\nrewrite_module: model.layers.{}.down"
    assert found["words"] == (
        "down of layer 3: reliability 99.0, generalization 70.0, locality agreement 50.0, capability 85.8 %; "
        "4 of 5 sites reach a reliability of 99.0 %; 2 of these come within 0.5 points of the highest "
        "capability, 86.0 % (90.0 before); the one that generalizes best is taken"
    )


def test_without_a_reliable_site_the_most_reliable_is_taken_and_that_is_said():
    table = [line(1, "up", 0.5, 0.9, 0.9), line(2, "up", 0.7, 0.1, 0.5), line(3, "up", 0.7, 0.2, 0.4)]
    found = recommend_site(table, BEFORE)
    assert found["layer"] == 2 and "2 of 3 sites reach a reliability of 70.0 %" in found["words"]


def test_without_capability_other_answers_stand_in_for_it_and_that_is_said():
    table = [line(1, "up", 1.0, 0.9, None, 0.2), line(2, "up", 1.0, 0.1, None, 0.4)]
    found = recommend_site(table, {})
    assert found["layer"] == 2 and "the highest locality agreement, 40.0 % (- before)" in found["words"]
    alone = [line(1, "up", 1.0, 0.9, None, None), line(2, "up", 1.0, 0.1, None, None)]
    found = recommend_site(alone, {})
    assert found["layer"] == 1 and "highest" not in found["words"]


def test_ties_go_to_what_changes_least_then_to_the_later_layer():
    first = line(1, "up", 1.0, 0.5, 0.5)
    for better in (
        line(0, "up", 1.0, 0.5, 0.503),
        line(0, "up", 1.0, 0.5, 0.5, agreement=0.6),
        line(0, "up", 1.0, 0.5, 0.5, parameters=99),
        line(2, "up", 1.0, 0.5, 0.5),
    ):
        assert best([first, better]) is better and best([better, first]) is better


def test_sites_whose_loss_was_not_finite_are_left_out():
    failed = line(9, "entire", None, None, None, None)
    found = recommend_site([failed, *TABLE], BEFORE)
    assert found["layer"] == 3 and "4 of 6 sites" in found["words"]
    with pytest.raises(FloatingPointError, match="smaller lr"):
        best([failed])

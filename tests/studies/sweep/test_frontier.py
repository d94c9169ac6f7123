"""The frontier of a sweep over ways to preserve: the settings that are picked, and the words."""

import json

import pytest

from locft_jax.studies.rule import is_frontier, method_of, pick, recommend_settings
from locft_jax.studies.sweep import print_results, write_results


def line(lr, reliability, generalization, agreement, preserve="none", strength=None, kl=None, capability=1.0):
    settings = {"lr": lr, "preserve": preserve, "preserve_strength": strength, "preserve_kl": kl}
    return {
        "name": json.dumps(settings), "settings": settings, "reliability": reliability,
        "reliability_eos_only": reliability, "generalization": generalization, "locality": agreement,
        "locality_agreement": agreement, "capability": capability, "steps": 10, "epochs": 10,
        "edit_seconds": 1.0, "stopped": "epochs", "dynamics": [],
    }  # fmt: skip


RUNS = [
    line(1e-3, 0.97, 0.85, 0.97),
    line(2e-3, 1.0, 0.92, 0.90),
    line(3e-3, 1.0, 0.95, 0.80),
    line(2e-3, 0.99, 0.90, 0.95, "soft", 10),
    line(2e-3, 0.90, 0.70, 0.99, "soft", 100),
    line(4e-3, 1.0, 0.94, 0.96, "none", None, 1.0),
    line(4e-3, 1.0, 0.95, 0.96, "soft", 10, 1.0),
    line(9e-1, None, None, None, "null", 0.9),
]


def test_the_fewest_changed_answers_among_the_reliable_then_generalization():
    assert pick(RUNS) is RUNS[6]
    assert pick(RUNS[:3]) is RUNS[1]
    assert pick(RUNS[4:5] + RUNS[:1]) is RUNS[0]  # none is reliable: the most reliable


def test_words_compare_with_plain_at_its_best_and_give_lines_to_paste():
    found = recommend_settings(RUNS)
    assert found["words"] == (
        'lr=0.004, soft, preserve_strength=10, preserve_kl=1.0: reliability 100.0, generalization 95.0, '
        "locality 96.0, capability 100.0 %; plain at its best: lr=0.002, none: reliability 100.0, "
        "generalization 92.0, locality 90.0, capability 100.0 %"
    )
    assert found["config"] == "lr: 0.004\npreserve: soft\npreserve_strength: 10\npreserve_kl: 1.0"
    # A null is said too: the config that it is pasted into may have another value.
    assert recommend_settings(RUNS[:3])["config"].endswith("preserve_strength: null\npreserve_kl: null")
    assert "plain at its best" not in recommend_settings(RUNS[:3])["words"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr": 1}, "plain"),
        ({"preserve": "none", "preserve_kl": 0}, "plain"),
        ({"preserve": "kfac", "preserve_data": "a/b.txt"}, "kfac, b.txt"),
        ({"preserve": "soft", "preserve_kl": 2}, "soft + KL"),
        ({"preserve_kl": 2, "preserve_data": "b.txt", "preserve_tokens": "last"}, "KL, b.txt, last tokens"),
        ({"preserve_kl": 2}, "KL"),
    ],
)
def test_methods_are_named(settings, name):
    assert method_of(settings) == name


def test_only_sweeps_over_preserving_have_a_frontier():
    assert is_frontier(RUNS)
    assert not is_frontier(RUNS[:1]) and not is_frontier(RUNS[-1:] * 2)
    assert not is_frontier([{**run, "settings": {"lr": run["settings"]["lr"]}} for run in RUNS])


def test_the_sweep_writes_the_picture_and_says_what_to_use(tmp_path, capsys):
    from rich.console import Console

    before = {"reliability": 0.0, "locality_agreement": 1.0}
    result = write_results(tmp_path, RUNS, {"title": "try", "before": before})
    assert json.loads((tmp_path / "sweep.json").read_text())["recommendation"] == result["recommendation"]
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.json", "sweep.csv", "sweep.png", "frontier.png"}
    print_results(result, Console(width=120))
    said = capsys.readouterr().out
    assert "What to use: " in said and "\npreserve_strength: 10\npreserve_kl: 1.0\n" in said

"""The locate command: a site is what a plain edit there gives; a killed run goes on to the same table."""

import csv
import json
import shutil

import jax
import pytest

from locft_jax.cli import locate
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.studies.locate.measure import Bench

MODULES = ["--modules", "mlp", "down"]
PLACES = [(l, m) for l in range(3) for m in ("mlp", "down")]
RATES = ("reliability", "generalization", "locality", "locality_agreement", "capability")


@pytest.fixture(scope="module")
def arguments(edit_arguments):
    """`arguments(out, option, ..., key=value)`: locate on the tiny model with EDITS. Layer and module of
    EDIT_SETTINGS are what is looked for: they change nothing."""
    return lambda out, *options, **changes: [*options, *edit_arguments(out, **changes)]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """The folder that locate wrote for all layers and two modules. Shared: do not write to it."""
    jax.clear_caches()  # what is compiled is counted
    out = tmp_path_factory.mktemp("locate") / "run"
    assert run_command(locate.main, arguments(out, *MODULES)) == 0
    return out


def table(out):
    """sites.json, and its lines without the seconds, by place."""
    result = json.loads((out / "sites.json").read_text())
    lines = {
        (s["layer"], s["module"]): {k: v for k, v in s.items() if k != "seconds"} for s in result["sites"]
    }
    return result, lines


def test_every_site_is_what_a_plain_edit_there_gives(run, edit_run, arguments, tmp_path):
    result, lines = table(run)
    assert list(lines) == PLACES
    reports = {(2, "mlp"): json.loads((edit_run / "report.json").read_text())}
    for layer in (0, 1):
        out = tmp_path / str(layer)
        changes = {
            "layer": layer,
            "rewrite_module": lines[layer, "down"]["rewrite_module"],
            "export": "[delta]",
        }
        assert run_command(edit, arguments(out, **changes)) == 0
        reports[layer, "down"] = json.loads((out / "report.json").read_text())
    for place, report in reports.items():
        line = lines[place]
        assert {k: line[k] for k in RATES} == {k: report["after"][k] for k in RATES}, place
        assert result["before"] == {k: report["before"].get(k) for k in RATES}
        assert (line["epochs"], line["steps"]) == (report["epochs_run"], report["steps_run"])
        assert (line["parameters"], line["stopped"]) == (report["site"]["parameters"], report["stopped"])
        assert line["loss"] == pytest.approx(report["epoch_losses"][-1], rel=1e-3)
        assert result["probes"] == report["probes"]
    assert len({json.dumps([line[k] for k in RATES]) for line in lines.values()}) > 2  # sites differ
    assert lines[2, "mlp"]["reliability"] == 1.0


def test_one_training_step_a_site_and_the_evaluation_not_for_every_module(run):
    made = table(run)[0]["compilations"]
    assert made["train_step"] == len(PLACES)
    assert made["score_batch"] == 3 + 1  # one a layer, and the choices of SKILLS
    assert made["layer_pass"] == 2 * 2  # edits and probes, each from tokens and from activations
    assert made["decode"] < len(PLACES) and made["admit"] < len(PLACES)  # one a shape


def test_the_folder(run):
    names = {"sites.csv", "sites.json", "curves.png", "heatmap.png"}
    assert {p.name for p in run.iterdir()} == names
    result, lines = table(run)
    with (run / "sites.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(int(r["layer"]), r["module"]) for r in rows] == PLACES
    for row, line in zip(rows, lines.values(), strict=True):
        assert {k: float(row[k]) for k in RATES} == {k: line[k] for k in RATES}
    top = result["recommendation"]
    assert (top["layer"], top["module"]) in lines and result["layers"] == 3
    assert top["config"] == f"layer: {top['layer']}\nrewrite_module: {top['rewrite_module']}"


def test_what_a_reader_is_told(run, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "sibling"
    assert run_command(locate.main, arguments(out, "--from-sibling", str(run / "sites.json"))) == 0
    said = capsys.readouterr().out
    result, lines = table(out)
    top = table(run)[0]["recommendation"]
    assert list(lines) == [(top["layer"], top["module"])]  # as deep as in a sibling of the same depth
    for part in ("unedited", result["recommendation"]["words"][:40], top["config"], "training steps and"):
        assert part in said, part


def interrupt_after(monkeypatch, count):
    """The bench stops as on Ctrl-C when it is to measure one more site."""
    left, measure = [None] * count, Bench.measure

    def some(self, place):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return measure(self, place)

    monkeypatch.setattr(Bench, "measure", some)


def test_a_killed_run_goes_on_to_the_same_table(run, arguments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "killed"
    with monkeypatch.context() as m:
        interrupt_after(m, 3)
        assert run_command(locate.main, arguments(out, *MODULES)) == 1
    assert "the 3 sites measured so far can be found in" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["checkpoint"]
    lines = out / "checkpoint/sites.jsonl"
    lines.write_text(lines.read_text() + '{"layer": 1, "mod')  # killed in the middle of a line
    for changed in (arguments(out, "--resume", *MODULES, lr="2e-2"), arguments(out, "--resume")):
        assert run_command(locate.main, changed) == 2
        assert "is of another run" in capsys.readouterr().err
    assert run_command(locate.main, arguments(out, *MODULES)) == 2  # neither --resume nor --overwrite
    assert "was interrupted; add --resume" in capsys.readouterr().err
    with monkeypatch.context() as m:
        m.setattr("locft_jax.studies.locate.measure.ask", before_is_kept(m))
        assert run_command(locate.main, arguments(out, "--resume", *MODULES)) == 0
    assert table(out)[1] == table(run)[1]
    assert table(out)[0]["recommendation"] == table(run)[0]["recommendation"]
    assert run_command(locate.main, arguments(out, "--resume", *MODULES)) == 0
    assert "finished: nothing to resume" in capsys.readouterr().out


def before_is_kept(monkeypatch):
    """`ask` that refuses to ask a model without drafts of what it will say."""
    from locft_jax.studies.locate.measure import ask

    def guarded(model, questions, drafts, *rest, **options):
        assert drafts is not None, "the answers before the edit were kept"
        return ask(model, questions, drafts, *rest, **options)

    return guarded


def test_a_run_that_measured_nothing_leaves_nothing(arguments, tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("locft_jax.prepare.load_opened", stop)
    assert run_command(locate.main, arguments(tmp_path / "out", *MODULES)) == 1
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_coarse_then_around_the_best(run, arguments, tmp_path):
    out = tmp_path / "coarse"
    assert run_command(locate.main, arguments(out, "--modules", "down", "--strategy", "coarse")) == 0
    every = table(run)[1]
    assert table(out)[1] == {place: line for place, line in every.items() if place[1] == "down"}


def test_a_site_that_fails_is_left_out(arguments, tmp_path, capsys):
    out = tmp_path / "failed"
    assert run_command(locate.main, arguments(out, "--modules", "down", "--layers", "2", lr="1e38")) == 1
    assert "a smaller lr would be right" in capsys.readouterr().err
    line = json.loads((out / "checkpoint/sites.jsonl").read_text())
    assert line["reliability"] is None and "the loss is" in line["stopped"]


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        (["--modules", "dwon"], {}, "--modules: 'dwon' is no module"),
        (["--modules", "model.layers.{}.router"], {}, "matches no tensor of this model"),
        (["--layers", "3"], {}, "layer: 3 is out of range"),
        (["--from-sibling", "missing.json"], {}, "--from-sibling: missing.json cannot be used"),
        (["--from-sibling", "a.json", "--layers", "1"], {}, "leave out --modules, --layers and --strategy"),
        ([], {"evaluate": "false"}, "evaluate: locate measures every site"),
        ([], {"data_path": "null"}, "data_path: no edits given"),
        ([], {"data_path": "missing.json"}, "missing.json"),
        ([], {"prefix_cache": "device", "memory_budget": "1e-9"}, "activation_cache: device needs"),
        ([], {"eval_evry": "3"}, "unknown key `eval_evry`"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    options, changes, said, arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("locft_jax.prepare.load_opened", lambda *args: pytest.fail("weights were loaded"))
    assert run_command(locate.main, arguments(tmp_path / "out", *options, **changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_are_replaced_only_when_asked(run, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("locft_jax.prepare.load_opened", lambda *args: pytest.fail("weights were loaded"))
    out = shutil.copytree(run, tmp_path / "copy")
    assert run_command(locate.main, arguments(out, *MODULES)) == 2
    assert "already exists" in capsys.readouterr().err
    (out / "sites.json").unlink()
    assert run_command(locate.main, arguments(out, "--overwrite", *MODULES)) == 2
    assert "holds no results (no sites.json)" in capsys.readouterr().err

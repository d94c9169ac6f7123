"""The plan command: topologies, arithmetic, the programs that are compiled, and what is refused."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from locft_jax.cli.command import run_command
from locft_jax.cli.plan import main
from locft_jax.config import Config, load_config
from locft_jax.data.packing import epoch_batches, even_rows, pack
from locft_jax.editing.run import schedule_of
from locft_jax.editing.site import read_site
from locft_jax.editing.step import init_state
from locft_jax.editing.trainer import run_shape
from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_load
from locft_jax.model.activation_cache import ROWS
from locft_jax.model.memory import Need
from locft_jax.model.sharding import make_mesh, place_batch
from locft_jax.model.weights import Params, weight_table
from locft_jax.studies.plan import fit
from locft_jax.studies.plan import programs as cases
from locft_jax.studies.plan.fit import Outcome, Usage, compiled, meshes, smallest, verdict
from locft_jax.studies.plan.programs import Shapes, chip_bytes, product_flops, programs
from locft_jax.studies.plan.topology import (
    GIB,
    TPUS,
    all_slices,
    larger,
    parse_topology,
    prepare_compiler,
    tpu_devices,
)

ROOT = Path(__file__).resolve().parents[2]
LARGE = str(ROOT / "configs" / "qwen2.5-72b-zsre.yaml")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler here (extra `aot`)"
)


# ---------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    ("text", "kind", "count", "one_host"),
    [
        ("v5e:4x4", "v5e", 16, False),
        ("v5e:2x4", "v5e", 8, False),
        ("v5e-8", "v5e", 8, True),
        ("v6e-8", "v6e", 8, True),
        ("v5e-16", "v5e", 16, False),
        ("v5p:2x2x1", "v5p", 4, False),
        ("v5p-8", "v5p", 4, True),
        ("v4-16", "v4", 8, False),
        ("gpu:8", "gpu", 8, False),
        ("cpu:3", "cpu", 3, False),
    ],
)
def test_names_of_machines(text, kind, count, one_host):
    t = parse_topology(text)
    assert (t.kind, t.count, t.one_host) == (kind, count, one_host)
    if kind in TPUS:
        assert t.memory == TPUS[kind].memory * GIB
    assert parse_topology(text, 7.5).memory == 7.5 * GIB


@pytest.mark.parametrize(
    "text",
    ["", "v5e", "v5e:4x5", "v5e:2x2x1", "v5p:2x2", "v5e-3", "v5p-2", "gpu:0", "gpu-8", "v7:2x2", "a\x1bb"],
)
def test_a_name_that_is_not_known_is_told_what_there_is(text):
    with pytest.raises(UserError, match=r"--topology: .* is not known.* v5e: 1x1, 2x2, .*gpu:N, cpu:N"):
        parse_topology(text)


def test_larger_machines_of_a_kind():
    sizes = [t.name for t in larger(parse_topology("v5e-8"))]
    assert sizes == ["v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert larger(parse_topology("gpu:3"))[0].count == 4 == larger(parse_topology("gpu:2"))[0].count
    assert not larger(parse_topology("cpu:8"))  # they share the host's memory
    assert larger(parse_topology("gpu:1", 24))[0].memory == 24 * GIB


def test_all_slices_begin_with_the_least_memory():
    every = all_slices()
    sizes = [t.count * t.memory for t in every]
    assert sizes == sorted(sizes) and (every[0].name, every[-1].kind) == ("v5e:1x1", "v5p")
    assert [t.name for t in every if t.one_host] == ["v5e-8", "v6e-8"]
    assert {t.kind for t in every} == {"v5e", "v5p", "v6e"}  # v4: by arithmetic


# ---------------------------------------------------------------- arithmetic


@pytest.fixture(scope="module")
def tiny(tiny_model_dir, edits_file):
    """(case of an edit of the tiny model's layer 1, notes)."""
    config = Config(str(tiny_model_dir), data_path=str(edits_file), layer=1, batch_size=5, row_length=32)
    return cases.make_case(config)


def test_a_case_takes_real_lengths_where_tokenizer_and_data_are_here(tiny, tiny_model_dir):
    case, notes = tiny
    assert notes == [] and case.edits == len(case.corpus) == 12 and case.dtype == np.float32
    assert case.layer == 1 and case.tokens == case.corpus.lengths.sum()
    bare, notes = cases.make_case(Config(str(tiny_model_dir), layer=1, num_edits=50))
    assert len(notes) == 1 and "lengths are assumed" in notes[0]
    assert len(bare.corpus) == bare.edits == 50 and abs(bare.corpus.lengths.mean() - 20) < 2


def test_large_runs_are_planned_on_a_sample():
    case, _ = cases.make_case(load_config(ROOT / "configs" / "qwen2.5-72b-zsre-100k.yaml"))
    assert (
        case.edits == 100_000
        and len(case.corpus) == cases.SAMPLE
        and case.site[0].startswith("model.layers.19.")
    )
    assert case.tokens == pytest.approx(2_000_000, rel=0.02)


def test_products_are_counted_as_often_as_a_loop_runs():
    def loss(w, x):
        return jax.lax.scan(lambda x, own: (jax.nn.relu(x @ own), None), x, w)[0].sum()

    w, x = np.ones((7, 4, 4), np.float32), np.ones((3, 4), np.float32)
    assert product_flops(jax.make_jaxpr(loss)(w, x).jaxpr) == 7 * 2 * 3 * 4 * 4
    # Backward two more each: of the input and of the matrix.
    assert product_flops(jax.make_jaxpr(jax.jit(jax.grad(loss)))(w, x).jaxpr) == 3 * 7 * 2 * 3 * 4 * 4


def test_the_work_of_programs_by_hand(tiny):
    """A matrix of p elements costs 2 p FLOPs a token, scores and their sum over values 2 each a pair."""
    case, spec = tiny[0], tiny[0].spec
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    traced = {p.name: p.trace() for p in programs(case, mesh, 2**40)}
    flops = {name: product_flops(t.jaxpr.jaxpr) for name, t in traced.items()}
    length, rows = even_rows(case.corpus, case.config.row_length, ROWS, 1)
    matrices = [row for row in weight_table(spec).values() if row.layers and len(row.shape) == 2]
    layer = 2 * sum(math.prod(row.shape) for row in matrices) + 4 * spec.n_heads * spec.head_dim * length
    assert flops["cache pass"] == case.layer * rows * length * layer
    # The compiler's own count, of what has no loop (one layer below the site, the site's, the last), has
    # what is no product too.
    for name in ("train step", "cache pass"):
        counted = traced[name].lower().compile().cost_analysis()["flops"]
        assert flops[name] < counted < 1.1 * flops[name], name
    assert Usage(programs(case, mesh, 2**40)[0], 0, 0, 0, 197 * 10**12, 1.0).at_least(
        parse_topology("v5e:2x2")
    ) == pytest.approx(0.25)


def test_meshes_are_the_configs_own_then_by_memory(tiny):
    case, _ = tiny
    found = meshes(case, parse_topology("v5e-8"))
    assert found[0].mesh == {"data": 1, "model": 8} and len(found) == 4
    totals = [o.total for o in found[1:]]
    assert totals == sorted(totals)
    own = with_settings(case, mesh={"data": 4, "model": 2})
    assert meshes(own, parse_topology("v5e-8"))[0].mesh == {"data": 4, "model": 2}
    small = parse_topology("v5e-8", found[1].total * 1.1 / GIB)  # the config's own does not fit
    assert meshes(own, small)[0].mesh == found[1].mesh


# ---------------------------------------------------------------- what is compiled is what runs


@pytest.mark.parametrize("int8", [False, True])
def test_the_arrays_of_a_plan_are_those_of_a_run(tiny, tiny_model_dir, int8):
    case = with_settings(tiny[0], weights="int8") if int8 else tiny[0]
    mesh = make_mesh({"data": 2, "model": 4})
    checkpoint = hf_folder.open_folder(str(tiny_model_dir))
    weights = hf_load.load_weights(checkpoint, mesh, int8=int8)
    own = {n: hf_folder.read_tensor(checkpoint, n) for n in case.site}
    state = init_state(read_site(Params(case.spec, weights), case.site, mesh, own))
    which = next(epoch_batches(len(case.corpus), 5, 0, 0))
    batch = pack(case.corpus, which, run_shape(case.corpus, schedule_of(case.config), mesh))
    shapes = Shapes(case, mesh, 2**40)
    planned = shapes.weights, shapes.state, shapes.batch(batch)
    for plan, real in zip(planned, (weights, state, place_batch(batch, mesh)), strict=True):
        assert jax.tree.structure(plan) == jax.tree.structure(real)
        for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.ndim == 0 or a.sharding.is_equivalent_to(b.sharding, a.ndim)
    shards = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(weights)]
    assert chip_bytes(planned[0]) == sum(shards)


def test_an_edit_is_four_programs(tiny):
    case, mesh = tiny[0], make_mesh({"data": 2, "model": 4})
    names = lambda **changes: [p.name for p in programs(with_settings(case, **changes), mesh, 2**40)]  # noqa: E731
    assert names() == ["train step", "cache pass", "evaluation pass", "decoding step"]
    assert names(activation_cache="off", evaluate=False) == ["train step"]


def with_settings(case, **changes):
    return dataclasses.replace(case, config=dataclasses.replace(case.config, **changes))


@pytest.fixture(scope="module")
def compiled_step(tiny):
    """(the plain training step on 2 x 4 devices, what it takes)."""
    step = programs(tiny[0], make_mesh({"data": 2, "model": 4}), 2**40)[0]
    return step, compiled(step)


def test_a_compiled_program_is_measured(tiny, compiled_step):
    case, (step, usage) = tiny[0], compiled_step
    cache = case.tokens * case.spec.d_model * 4 // 4
    assert usage.temporaries > 0 and usage.held >= cache
    assert usage.total == step.weights + step.tuned + usage.held + usage.temporaries


def test_what_preserving_holds_is_counted(tiny, compiled_step):
    """P_in [in, in] and P_out [out, out], and a batch of retained texts."""
    case, mesh, spec = tiny[0], make_mesh({"data": 2, "model": 4}), tiny[0].spec
    assert case.site == ("model.layers.1.mlp.down_proj.weight",)
    inner, outer = spec.d_ff**2 * 4 // 4, spec.d_model**2 * 4  # its columns are split, its rows are not
    assert chip_bytes(Shapes(with_settings(case, preserve="soft"), mesh, 2**40).sides()) == inner
    kfac = compiled(programs(with_settings(case, preserve="kfac"), mesh, 2**40)[0])
    assert kfac.held - compiled_step[1].held == inner + outer
    kl = with_settings(case, preserve_kl=1.0)
    assert Shapes(case, mesh, 2**40).retain_batch() is None
    assert chip_bytes(Shapes(kl, mesh, 2**40).retain_batch())
    step = programs(kl, mesh, 2**40)[0]
    assert product_flops(step.trace().jaxpr.jaxpr) > 1.5 * compiled_step[1].flops
    assert step.weights == compiled_step[0].weights


def test_what_a_compiler_says_that_ran_out(tiny):
    def lower():
        raise RuntimeError(error[0])

    error = ["RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm."]
    traced = SimpleNamespace(lower=lower, jaxpr=jax.make_jaxpr(lambda: 1)())
    program = fit.Program("train step", lambda: traced, 1, 1, 2**30)
    usage = compiled(program)
    assert usage.total == int(18.5 * 2**30) and usage.temporaries is None
    assert not Outcome(parse_topology("v5p:2x2x1"), {}, Need(0, 0, 0), (usage,)).fits
    error[0] = "another"
    with pytest.raises(RuntimeError, match="another"):
        compiled(program)


def test_the_search_compiles_only_where_arithmetic_sees_hope(monkeypatch):
    case, _ = cases.make_case(load_config(LARGE))
    tried = []

    def compile_all(case, outcome):
        tried.append((outcome.topology.name, outcome.mesh["model"]))
        total = 20 * GIB if outcome.topology.count < 32 else 10 * GIB
        usage = Usage(fit.Program("train step", lambda: None, 1, 1), 0, 0, total, 1, 1.0)
        return dataclasses.replace(outcome, usages=(usage,))

    monkeypatch.setattr(fit, "compile_all", compile_all)
    found = smallest(case, larger(parse_topology("v5e:2x2")))
    assert found.topology.name == "v5e:4x8" and found.fits
    assert {name for name, _ in tried} == {"v5e:4x4", "v5e:4x8"}  # not 2x4: 145 GB of weights on 8 x 16 GiB
    assert smallest(case, [parse_topology("v5e:2x4")]) is None
    near = fit.plan(case, parse_topology("v5e:2x4"))  # was asked for: compiled all the same
    assert near.usages and not near.fits
    assert verdict(near, found) == "does not fit: smallest topology that does: v5e:4x8 with " + (
        f"mesh={{data: {found.mesh['data']}, model: {found.mesh['model']}}}"
    )
    assert verdict(found, found) == "fits: 10.00 GiB a chip, 6.00 GiB to spare"


# ---------------------------------------------------------------- the command


def told(capsys, *arguments):
    """What the command prints as JSON."""
    assert run_command(main, [str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_gpus_by_arithmetic(capsys):
    one = told(capsys, LARGE, "--topology", "gpu:1")
    assert not one["plan"]["fits"] and one["smallest_that_fits"]["topology"] == "gpu:4"
    assert one["plan"]["arithmetic"]["weights"] == pytest.approx(72_706_203_648 * 2 / GIB, abs=1e-3)
    assert one["row_length"] == 128 and one["plan"]["programs"] == []
    smaller = ("--weights", "int8", "--memory", 139, "--seq", 64, "--batch_size", 50)
    int8 = told(capsys, LARGE, "--topology", "gpu:1", *smaller)
    assert int8["plan"]["fits"] and int8["weights"] == "int8"
    assert (int8["batch_size"], int8["row_length"]) == (50, 64)
    assert int8["plan"]["arithmetic"]["weights"] < 0.51 * one["plan"]["arithmetic"]["weights"]


def test_the_demo_on_this_machine(capsys):
    assert run_command(main, ["--topology", "cpu:2"]) == 0
    out = capsys.readouterr().out
    assert "mesh data 1 x model 2" in out and out.rstrip().splitlines()[-1].startswith("fits by arithmetic: ")
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5e:9x9"], "--topology: 'v5e:9x9' is not known"),
        (["--topology", "gpu:8", "--set", "model_name_or_path=no/such-model"], "--model-config FILE"),
        (["--topology", "gpu:8", "--model-config", "{tmp}/none.json"], "--model-config: no file"),
        (["--topology", "gpu:8", "--set", "layer=80"], "out of range"),
        (["--topology", "gpu:8", "--batch_size", "0"], "batch_size"),
        (["--topology", "v5e:4x4"], "pip install 'locft_jax[aot]'"),
        ([], "pip install 'locft_jax[aot]'"),
    ],
)
def test_what_is_refused(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as where it is not installed
    assert run_command(main, [LARGE, *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and shown.out == ""


def test_a_bare_config_json_is_enough(capsys, tmp_path):
    shape = ROOT / "configs" / "models" / "Qwen2.5-7B-Instruct.json"
    given = told(capsys, LARGE, "--topology", "gpu:1", "--set", f"model_name_or_path={shape}")
    beside = told(capsys, ROOT / "configs" / "qwen2.5-7b-zsre.yaml", "--topology", "gpu:1")
    assert given["plan"]["arithmetic"]["weights"] == beside["plan"]["arithmetic"]["weights"]
    own = tmp_path / "own.yaml"
    own.write_text("model_name_or_path: me/mine\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.json").write_text(shape.read_text())
    assert told(capsys, own, "--topology", "gpu:1")["plan"]["fits"]


def test_a_v4_is_planned_by_arithmetic(capsys):
    plan = told(capsys, LARGE, "--topology", "v4:2x2x2")["plan"]
    assert plan["programs"] == [] and plan["chips"] == 8 and plan["fits"]


@needs_libtpu
def test_libtpu_knows_every_slice():
    prepare_compiler()
    for t in [*all_slices(), *map(parse_topology, ("v5e-1", "v5e-4", "v5p-8", "v5e:2x4"))]:
        devices = tpu_devices(t)
        assert len(devices) == t.count, t.name
        assert not t.one_host or len({d.process_index for d in devices}) == 1, t.name
    with pytest.raises(UserError, match="does not know v5e:3x5"):
        tpu_devices(dataclasses.replace(parse_topology("v5e:4x4"), shape=(3, 5)))


@needs_libtpu
def test_the_tpus_compiler_says_what_a_small_edit_takes(capsys, tiny_model_dir, edits_file):
    settings = [f"model_name_or_path={tiny_model_dir}", f"data_path={edits_file}", "layer=1", "batch_size=5"]
    plan = told(capsys, "--topology", "v5e:2x2", "--set", *settings)["plan"]
    assert plan["fits"] and plan["chips"] == 4 and plan["mesh"] == {"data": 1, "model": 4}
    assert [p["program"] for p in plan["programs"]] == [
        "train step", "cache pass", "evaluation pass", "decoding step"
    ]  # fmt: skip
    assert all(0 < p["total"] < 1 and p["seconds_at_least"] > 0 for p in plan["programs"])

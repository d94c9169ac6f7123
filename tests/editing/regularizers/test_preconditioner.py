"""Preconditioners against plain numpy, kept on disk, in whole runs on one device and eight, resumed; what is
refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked import stopping_at

from locft_jax import Config, prepare
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.editing.hooks import Progress
from locft_jax.editing.regularizers import second_moments
from locft_jax.editing.regularizers.preconditioner import (
    input_matrix,
    lambda_of,
    make_preconditioner,
    strength_of,
)
from locft_jax.editing.regularizers.second_moments import Leading
from locft_jax.editing.step import Hyper, make_optimizer
from locft_jax.io.delta import load_delta

TEXTS = ["The capital of Oredal is Vintown.", "Ten plus five is 15.", "Hana Orvik works as a baker."]
SITE = [f"model.layers.{l}.{m}.weight" for l, m in ((1, "self_attn.q_proj"), (1, "self_attn.k_proj"),
        (1, "self_attn.o_proj"), (2, "mlp.up_proj"), (2, "mlp.down_proj"))]  # fmt: skip


def test_soft_is_lambda_times_the_inverse():
    x = np.random.default_rng(0).standard_normal((50, 6)) * [9, 3, 1, 1, 0.1, 0.01]
    c = x.T @ x / 50
    lam = np.trace(c) / 6 / 7
    want = lam * np.linalg.inv(c + lam * np.eye(6))
    np.testing.assert_allclose(input_matrix(c, "soft", 7), want, atol=1e-6)
    np.testing.assert_allclose(input_matrix(1e6 * c, "soft", 7), want, atol=1e-6)  # no unit
    assert lambda_of(c, 7) == pytest.approx(lam)


def test_null_takes_out_the_directions_that_hold_the_energy():
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    c = basis @ np.diag([6.0, 3.0, 0.9, 0.1]) @ basis.T  # shares .6 .3 .09 .01
    for strength, gone in ((0.5, 1), (0.8, 2), (0.95, 3)):
        want = np.eye(4) - basis[:, :gone] @ basis[:, :gone].T
        np.testing.assert_allclose(input_matrix(c, "null", strength), want, atol=1e-6)


def test_five_steps_equal_plain_numpy():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 7)), rng.standard_normal((40, 7))
    p, q = input_matrix(x.T @ x / 40, "soft", 10), input_matrix(w @ w.T, "kfac", 3)
    gradients = rng.standard_normal((5, 5, 7))
    optimizer = make_optimizer(
        Hyper(0.1, 0.0, 0.5), {"w": (jnp.asarray(p), None), "both": (jnp.asarray(p), jnp.asarray(q))}
    )
    theta = {"w": jnp.asarray(w, jnp.float32), "both": jnp.asarray(w, jnp.float32), "norm": jnp.ones(3)}
    state = optimizer.init(theta)
    m = v = np.zeros_like(w)
    want, both, count = w.copy(), w.copy(), 0
    for i, g in enumerate(gradients):
        loss = 0.1 if i == 2 else 1.0  # one step is skipped
        grads = {"w": jnp.asarray(g, jnp.float32), "norm": jnp.ones(3)}
        grads["both"] = grads["w"]
        updates, state = optimizer.update(grads, state, theta, loss=jnp.float32(loss))
        theta = {n: a + updates[n] for n, a in theta.items()}
        if loss >= 0.5:
            count += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            step = 0.1 * (m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)) @ p
            want, both = want - step, both - q @ step
    np.testing.assert_allclose(theta["both"], both, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(theta["w"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(theta["norm"], 1 - 0.1 * count, rtol=1e-5)  # a tensor without a P


def test_where_last_tokens_count_soft_is_weaker_by_default():
    assert strength_of(Config(preserve="soft")) == 10
    assert strength_of(Config(preserve="soft", preserve_tokens="last", preserve_data="templates")) == 3


def test_moments_are_computed_once(model, split_model, texts, tmp_path, monkeypatch):
    """Of one model, site and texts, on one mesh; anything else is computed, and so is what was damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    for compute in (second_moments.second_moments, second_moments.gradient_moments):
        name = compute.__name__
        monkeypatch.setattr(second_moments, name, lambda *a, f=compute, n=name: made.append(n) or f(*a))
    config = Config(preserve="kfac", row_length=32)

    def once(site=SITE, ids=texts[:20], config=config, model=model):
        made.clear()
        return *make_preconditioner(model, site, config, ids), list(made)

    first, lambdas, computed = once()
    assert computed == ["second_moments", "gradient_moments"]
    again, same, computed = once()
    assert not computed and same == lambdas
    for name, sides in first.items():
        for one, other in zip(sides, again[name], strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert not once(config=Config(preserve="soft", preserve_strength=3, row_length=32))[2]
    assert once(ids=texts[:19])[2] and once(site=SITE[:1])[2]
    assert once(config=Config(preserve="kfac", seed=1, row_length=32))[2] == ["gradient_moments"]
    assert once(model=split_model)[2]
    edited = model.with_overrides({SITE[0]: np.zeros(model.folder.tensors[SITE[0]].shape, np.float32)})
    assert once(model=edited)[2] and once(model=edited)[2]
    for file in (tmp_path / "locft_jax" / "moments").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert once()[2] and not once()[2]


def test_wide_moments_are_kept_too(model, texts, narrow, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [make_preconditioner(model, SITE, Config(preserve="soft"), texts[:20]) for _ in range(2)]
    assert len(list((tmp_path / "locft_jax" / "moments").iterdir())) == 1 and found[0][1] == found[1][1]
    for one, other in zip(*(jax.tree.leaves(f[0]) for f in found), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_cache_that_cannot_be_written_is_no_error(model, texts, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert make_preconditioner(model, SITE[:1], Config(preserve="soft"), texts[:5])[0]
    assert "second moments could not be kept" in caplog.text


# ---------------------------------------------------------------- too wide for a matrix


@pytest.mark.parametrize("method", ["soft", "null"])
def test_low_rank_is_exact_where_the_moment_has_no_more(model, texts, narrow, monkeypatch, method):
    """20 tokens span 20 directions."""
    few, site, strength = [texts[0][:10], texts[1][:10]], SITE[3:], {"soft": 10, "null": 0.9}[method]
    known = second_moments.second_moments(model, site, few, 32)
    monkeypatch.setattr(second_moments, "EXACT", 1000)
    whole = second_moments.second_moments(model, site, few, 32)
    for name, own in known.items():
        assert isinstance(own, Leading)
        got, c = input_matrix(own, method, strength), np.asarray(whole[name])
        assert lambda_of(own, 10) == pytest.approx(lambda_of(c, 10), rel=1e-5)
        dense = np.eye(len(c)) - (got.basis * got.damp) @ got.basis.T
        np.testing.assert_allclose(dense, input_matrix(c, method, strength), atol=1e-4)


def test_a_low_rank_update_is_the_product_with_its_matrix():
    rng = np.random.default_rng(0)
    known = [
        Leading(np.linalg.qr(rng.standard_normal((n, 3)))[0].astype(np.float32), np.array([5.0, 2, 1]), 9.0)
        for n in (7, 5)
    ]
    inner, outer = (input_matrix(own, "kfac", 4) for own in known)
    assert input_matrix(known[0], "null", 0.6).damp.tolist() == [1, 1, 0]  # 5 of 9 are not enough, 7 are
    dense = [np.eye(len(p.basis)) - (p.basis * p.damp) @ p.basis.T for p in (inner, outer)]
    optimizer = make_optimizer(Hyper(0.1, 0.0, 0.0), {"w": (inner, outer)})
    plain = make_optimizer(Hyper(0.1, 0.0, 0.0), {})
    theta = {"w": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)}
    grads = {"w": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)}
    got, want = (o.update(grads, o.init(theta), theta, loss=jnp.float32(1))[0] for o in (optimizer, plain))
    np.testing.assert_allclose(got["w"], dense[1] @ want["w"] @ dense[0], atol=1e-6)


# ---------------------------------------------------------------- refused before weights load


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preserve": "hard"}, "it must be one of none, soft, null, kfac"),
        ({"preserve": "soft", "preserve_tokens": "last"}, "preserve_tokens: last is for prompts"),
        ({"preserve_kl": -1}, "a number >= 0"),
        ({"preserve_kl": 1, "preserve_data": "missing.txt"}, "preserve_data: missing.txt"),
        ({"preserve": "soft", "preserve_strength": 0}, "a number > 0"),
        ({"preserve": "null", "preserve_strength": 1}, "> 0 and < 1"),
        ({"preserve": "soft", "preserve_data": "missing.txt"}, "preserve_data: missing.txt"),
        ({"preserve": "soft", "preserve_data": "missing.jsonl"}, "missing.jsonl"),
        ({"preserve_kl": 1, "preserve_data": "SHORT.txt"}, "SHORT.txt holds no text of two tokens or more"),
        ({"preserve": "soft", "preserve_data": "templates"}, "`subject`"),
        ({"preserve": "soft", "rewrite_module": "model.embed_tokens"}, "matrices of layers only"),
        ({"preserve": "soft", "rewrite_module": "model.layers.{}.input_layernorm"}, "no matrix"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_load(
    edit_arguments, tmp_path, capsys, monkeypatch, changes, says
):
    monkeypatch.setattr(prepare, "load_opened", lambda *a: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SHORT.txt").write_text("a\n")
    assert run_command(edit, edit_arguments(tmp_path / "out", **changes)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the whole run

RUN = {"num_steps": 4, "loss_floor": 0, "checkpoint_every": 1, "evaluate": "false", "export": "delta"}


@pytest.fixture(scope="module")
def runs(edit_arguments, tmp_path_factory):
    """`runs(name, **changes)` -> the tensors and metadata that a run leaves; made once each."""
    folder, known = tmp_path_factory.mktemp("preserve"), {}

    def run(name, **changes):
        if name not in known:
            assert run_command(edit, edit_arguments(folder / name, **RUN, **changes)) == 0
            known[name] = load_delta(folder / name / "delta.safetensors"), folder / name
        return known[name]

    return run


def test_resumed_runs_end_with_the_same_bytes(runs, edit_arguments, tmp_path, monkeypatch):
    both = {"preserve": "soft", "preserve_kl": 1}
    _, whole = runs("both", **both)
    out = tmp_path / "out"
    arguments = edit_arguments(out, **RUN, **both)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step", stopping_at(5))
        assert run_command(edit, arguments) == 1
    assert run_command(edit, [*arguments, "--resume"]) == 0
    assert json.loads((out / "report.json").read_text())["resumed"]
    for name in ("delta.safetensors", "steps.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_methods_differ_and_say_what_they_are(runs):
    plain, folder = runs("none")
    assert json.loads((folder / "report.json").read_text())["preserve"] is None
    assert "preserve" not in plain.metadata
    first = (folder / "steps.jsonl").read_text().splitlines()[0]
    tried = [
        ("soft", 10, None),
        ("kfac", 1, None),
        ("null", 0.5, None),
        ("none", None, 1),
        ("none", None, 9),
        ("soft", 10, 1),
    ]
    seen = [plain]
    for method, strength, kl in tried:
        changes = {"preserve_strength": strength} if method == "null" else {}
        name = "both" if method == "soft" and kl else f"{method} {kl}"
        delta, folder = runs(name, preserve=method, **changes, **({"preserve_kl": kl} if kl else {}))
        assert all(any((delta.new[n] != other.new[n]).any() for n in plain.new) for other in seen)
        seen.append(delta)
        told = json.loads((folder / "report.json").read_text())["preserve"]
        assert (told["method"], told["strength"], told["kl"]) == (method, strength, kl)
        assert told["source"] == "model" and json.loads(delta.metadata["preserve"]) == told
        sides = {"soft": {"inputs"}, "kfac": {"inputs", "outputs"}}.get(method)
        assert (told["lambda"] and {n: set(own) for n, own in told["lambda"].items()}) == (
            sides and dict.fromkeys(plain.new, sides)
        )
        # The first loss comes before any update, and counts the edits only.
        assert (folder / "steps.jsonl").read_text().splitlines()[0] == first


def test_a_run_with_wide_matrices_is_that_with_whole_ones(runs, tmp_path, narrow):
    """TEXTS have fewer tokens than eigenvectors are kept: 1 device, 8, and exact matrices are one run."""
    monkey = {"preserve": "soft", "preserve_data": tmp_path / "kept.txt"}
    monkey["preserve_data"].write_text("one two\nred blue\n")
    few = [
        runs(f"low {mesh}", **monkey, mesh=mesh)[0] for mesh in ("{data: 1, model: 1}", "{data: 2, model: 4}")
    ]
    second_moments.EXACT = 1000
    exact, _ = runs("exact", **monkey, mesh="{data: 1, model: 1}")
    for name, value in exact.new.items():
        moved = np.abs(value - exact.base[name]).max()
        for own in few:  # Adam's first steps follow signs of gradients: a tiny one may flip
            assert np.quantile(np.abs(own.new[name] - value), 0.99) < 0.02 * moved, name


def test_eight_devices_train_alike(runs, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("\n".join(TEXTS))
    everything = {"preserve": "kfac", "preserve_data": kept, "preserve_kl": 1}
    one, _ = runs("one", **everything)
    many, _ = runs("many", **everything, mesh="{data: 2, model: 4}")
    for name, value in one.new.items():
        moved = np.abs(value - one.base[name]).max()
        # Adam's first steps follow signs of gradients: a tiny one may flip.
        assert np.quantile(np.abs(many.new[name] - value), 0.99) < 0.02 * moved, name

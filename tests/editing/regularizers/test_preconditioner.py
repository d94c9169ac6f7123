"""Preserving edits against plain numpy, on one device and eight, resumed, and what is refused."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locft_jax import Config, prepare
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.data.requests import requests_from_records
from locft_jax.editing import trainer
from locft_jax.editing.regularizers import preconditioner
from locft_jax.editing.regularizers import second_moments as moments_module
from locft_jax.editing.regularizers.preconditioner import input_matrix, lambda_of, low_rank, strength_of
from locft_jax.editing.regularizers.second_moments import (
    Leading,
    gradient_moments,
    layer_inputs,
    second_moments,
)
from locft_jax.editing.regularizers.texts import (
    retained_ids,
    retained_texts,
    sample_model,
    template_texts,
    unused,
)
from locft_jax.editing.step import Hyper, make_optimizer
from locft_jax.io.hf_load import load_model
from locft_jax.model import decoder

TEXTS = ["The capital of Oredal is Vintown.", "Ten plus five is 15.", "Hana Orvik works as a baker."]
ONE = {"data": 1, "model": 1}
SITE = [f"model.layers.{l}.{m}.weight" for l, m in ((1, "self_attn.q_proj"), (1, "self_attn.k_proj"),
        (1, "self_attn.o_proj"), (2, "mlp.up_proj"), (2, "mlp.down_proj"))]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh=ONE)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    parts = [rng.integers(1, 300, rng.integers(3, 30)) for _ in range(150)]  # several batches
    return [part.tolist() for part in parts]


@pytest.fixture(scope="module")
def moments(model, texts):
    found = second_moments(model.spec, model.weights, SITE, texts, model.mesh, 32)
    return {name: np.asarray(c) for name, c in found.items()}


# ---------------------------------------------------------------- C


@pytest.mark.parametrize("last", [False, True])
def test_second_moments_equal_those_of_transformers_activations(
    torch, tiny_model_dir, model, texts, moments, last
):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)
    sums = {}

    def watch(name):
        def hook(module, inputs):
            x = inputs[0][0, -1:] if last else inputs[0][0, 1:]
            x = x.double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    for name in SITE:
        reference.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for ids in texts:
            reference(torch.tensor([ids]))
    assert moments.keys() == set(SITE)
    given = (model.spec, model.weights, SITE, texts, model.mesh, 32)
    for name, c in (second_moments(*given, last=True) if last else moments).items():
        want = sums[name] / (len(texts) if last else sum(len(ids) - 1 for ids in texts))
        assert c.dtype == np.float32
        np.testing.assert_allclose(c, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_layer_inputs_run_the_block_itself(model):
    w = {k: a[1] for k, a in model.weights.items() if k not in ("embed", "norm", "head")}
    x = jax.random.normal(jax.random.key(0), (2, 9, model.spec.d_model))
    rows = decoder.Rows(jnp.ones((2, 9), jnp.int32), jnp.tile(jnp.arange(9), (2, 1)))
    window = decoder.windows(model.spec)[1]
    got, _ = layer_inputs(model.spec, w, x, rows, window)
    np.testing.assert_allclose(got, decoder.block(model.spec, w, x, rows, window)[0], rtol=1e-5, atol=1e-5)


def test_matrices_with_one_input_share_one_statistic(model, texts):
    names = [n for n in SITE if "q_proj" in n or "k_proj" in n]
    found = second_moments(model.spec, model.weights, names, texts, model.mesh, 32)
    assert found[names[0]] is found[names[1]]


def test_eight_devices_give_the_same_statistics(tiny_model_dir, texts, moments):
    split = load_model(str(tiny_model_dir), mesh={"data": 2, "model": 4})
    found = second_moments(split.spec, split.weights, SITE, texts, split.mesh, 32)
    for name, c in found.items():
        np.testing.assert_allclose(c, moments[name], rtol=1e-4, atol=1e-5 * moments[name].max())


# ---------------------------------------------------------------- G


@pytest.mark.parametrize("last", [False, True])
def test_gradient_moments_equal_torchs(torch, model, tiny_model_dir, texts, last):
    """The labels come from `sampled`, by the rule that the code states; everything else is torch's."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float64)
    found = gradient_moments(model.spec, model.weights, SITE, texts[:20], model.mesh, 32, seed=3, last=last)
    sums, at, used = dict.fromkeys(SITE, 0), 0, slice(-1 if last else 1, None)
    for name in SITE:
        module = reference.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(lambda m, i, out, name=name: kept.__setitem__(name, out))
    draw = jax.vmap(lambda place, s: jax.random.categorical(jax.random.fold_in(jax.random.key(3), place), s))
    for ids in texts[:20]:
        kept = {}
        scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        labels = draw(at + jnp.arange(len(ids)), jnp.asarray(scores.detach().numpy(), jnp.float32))
        at += len(ids) + 1  # a corpus has one more token a text
        own = scores.gather(1, torch.tensor(np.asarray(labels, np.int64))[:, None])[used].sum()
        for name, g in zip(SITE, torch.autograd.grad(own, [kept[n] for n in SITE]), strict=True):
            sums[name] += (g[0, used].T @ g[0, used]).numpy()
    for name, got in found.items():
        want = sums[name] / (20 if last else sum(len(ids) - 1 for ids in texts[:20]))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=name)


# ---------------------------------------------------------------- P, and the transformation


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


def test_moments_are_computed_once(tiny_model_dir, texts, tmp_path, monkeypatch):
    """Of one model, site and texts, on one mesh; anything else is computed, and so is what was damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, made = load_model(str(tiny_model_dir), mesh=ONE), []
    for compute in (second_moments, gradient_moments):
        name = compute.__name__
        monkeypatch.setattr(preconditioner, name, lambda *a, f=compute, n=name: made.append(n) or f(*a))
    config = Config(preserve="kfac", row_length=32)

    def once(site=SITE, ids=texts[:20], config=config, model=model):
        made.clear()
        return *preconditioner.make_preserve(model, site, config, ids), list(made)

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
    assert once(model=load_model(str(tiny_model_dir), mesh={"data": 2, "model": 4}))[2]
    edited = model.with_overrides({SITE[0]: np.zeros(model.folder.tensors[SITE[0]].shape, np.float32)})
    assert once(model=edited)[2] and once(model=edited)[2]
    for file in (tmp_path / "locft_jax" / "moments").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert once()[2] and not once()[2]


def test_wide_moments_are_kept_too(model, texts, narrow, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [preconditioner.make_preserve(model, SITE, Config(preserve="soft"), texts[:20]) for _ in range(2)]
    assert len(list((tmp_path / "locft_jax" / "moments").iterdir())) == 1 and found[0][1] == found[1][1]
    for one, other in zip(*(jax.tree.leaves(f[0]) for f in found), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_cache_that_cannot_be_written_is_no_error(model, texts, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert preconditioner.make_preserve(model, SITE[:1], Config(preserve="soft"), texts[:5])[0]
    assert "could not be kept" in capsys.readouterr().err


# ---------------------------------------------------------------- too wide for a matrix


@pytest.fixture
def narrow(monkeypatch):
    """Everything counts as wide; 24 eigenvectors of it."""
    monkeypatch.setattr(moments_module, "EXACT", 8)
    monkeypatch.setattr(moments_module, "RANK", 24)


@pytest.mark.parametrize("mesh", [ONE, {"data": 2, "model": 4}])
def test_leading_eigenvectors_are_those_of_the_whole_moment(tiny_model_dir, texts, moments, narrow, mesh):
    model = load_model(str(tiny_model_dir), mesh=mesh)
    found = second_moments(model.spec, model.weights, SITE, texts, model.mesh, 32)
    for name, own in found.items():
        values, vectors = np.linalg.eigh(moments[name].astype(np.float64))
        assert own.vectors.shape == (len(values), 24) and own.trace == pytest.approx(values.sum(), rel=1e-4)
        np.testing.assert_allclose(own.vectors.T @ own.vectors, np.eye(24), atol=1e-5)
        # Three passes find those well apart from the rest; of the others the span is what counts.
        np.testing.assert_allclose(own.values[:3], values[::-1][:3], rtol=0.02, err_msg=name)
        held = np.trace(own.vectors.T @ moments[name] @ own.vectors)
        assert held == pytest.approx(own.values.sum(), rel=1e-3) and held > 0.95 * values[-24:].sum()


@pytest.mark.parametrize("method", ["soft", "null"])
def test_low_rank_is_exact_where_the_moment_has_no_more(model, texts, narrow, monkeypatch, method):
    """20 tokens span 20 directions."""
    few, site, strength = [texts[0][:10], texts[1][:10]], SITE[3:], {"soft": 10, "null": 0.9}[method]
    known = second_moments(model.spec, model.weights, site, few, model.mesh, 32)
    monkeypatch.setattr(moments_module, "EXACT", 1000)
    whole = second_moments(model.spec, model.weights, site, few, model.mesh, 32)
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
    inner, outer = (low_rank(own, "kfac", 4) for own in known)
    assert low_rank(known[0], "null", 0.6).damp.tolist() == [1, 1, 0]  # 5 of 9 are not enough, 7 are
    dense = [np.eye(len(p.basis)) - (p.basis * p.damp) @ p.basis.T for p in (inner, outer)]
    optimizer = make_optimizer(Hyper(0.1, 0.0, 0.0), {"w": (inner, outer)})
    plain = make_optimizer(Hyper(0.1, 0.0, 0.0))
    theta = {"w": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)}
    grads = {"w": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)}
    got, want = (o.update(grads, o.init(theta), theta, loss=jnp.float32(1))[0] for o in (optimizer, plain))
    np.testing.assert_allclose(got["w"], dense[1] @ want["w"] @ dense[0], atol=1e-6)


# ---------------------------------------------------------------- what is retained


def test_the_model_is_sampled_alike_every_time(model):
    first, second, other = (sample_model(model, seed, count=8, length=12) for seed in (0, 0, 1))
    assert first == second != other
    eos = model.tokenizer.eos_token_id
    assert all(s[0] == eos and 2 <= len(s) <= 12 and eos not in s[1:-1] for s in first)


def test_a_sampled_token_is_drawn_from_the_models_distribution(model):
    texts = sample_model(model, 0, count=3000, length=2)
    seen = np.bincount([t[1] for t in texts], minlength=model.spec.vocab_size) / len(texts)
    start = jnp.asarray([[model.tokenizer.eos_token_id]])
    want = jax.nn.softmax(decoder.logits(model.params, start)[0, 0])
    assert np.abs(seen - np.asarray(want)).sum() < 0.35  # about 0.2 is chance here; uniform gives > 1


def test_templates_show_no_known_subject():
    names = [("Hana", "Orvik"), ("Mira", "Halver"), ("Tovin", "Selt"), ("Ketil", "Brask")]
    records = [
        {"prompt": f"The sign of {a} {b} is", "target_new": "red", "subject": f"{a} {b}"} for a, b in names
    ]
    requests = requests_from_records(records, None, "keep").requests
    texts = template_texts(requests, seed=0)
    assert len(texts) == 4 * len(records) and texts == template_texts(requests, seed=0)
    known = {word for name in names for word in name}
    for text in texts:
        assert text.startswith("The sign of ") and text.endswith(" is")
        assert not known & set(text.split())


def test_files_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n\nanother\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one text"}\n{"prompt": "another", "answer": "x"}\n')
    for name in ("a.txt", "b.jsonl"):
        config = Config(preserve="soft", preserve_data=str(tmp_path / name))
        assert retained_texts(config, []) == ["one text", "another"]


def test_of_a_long_prompt_the_end_is_kept(model):
    config = Config(preserve="soft", preserve_tokens="last", preserve_data="prompts.txt")
    texts = ["a b " * model.spec.max_position + "c"]
    (whole,) = model.tokenizer(texts, add_special_tokens=False).input_ids
    assert len(whole) > model.spec.max_position
    (ids,) = retained_ids(model, config, texts)
    assert ids == whole[-model.spec.max_position :]


def test_where_last_tokens_count_soft_is_weaker_by_default():
    assert strength_of(Config(preserve="soft")) == 10
    assert strength_of(Config(preserve="soft", preserve_tokens="last", preserve_data="templates")) == 3


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, ["preserve_strength", "preserve_data", "preserve_tokens"]),
        ({"preserve_kl": 1}, ["preserve_strength"]),
        ({"preserve": "soft"}, []),
    ],
)
def test_notes_on_what_preserves_nothing(changes, keys):
    config = Config(preserve_strength=3, preserve_data="templates", preserve_tokens="last", **changes)
    assert [note.split("`")[1].split(":")[0] for note in unused(config)] == keys
    assert unused(Config(**changes)) == []


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
    from locft_jax.io.delta import load_delta

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
    make, out = trainer.StepRecord, tmp_path / "out"

    def stop(epoch, at, *rest):
        if at == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(epoch, at, *rest)

    arguments = edit_arguments(out, **RUN, **both)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "StepRecord", stop)
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
    moments_module.EXACT = 1000
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

"""Our evaluation against transformers' batched greedy `generate`: the same answers, sooner.

    python benchmarks/evaluation_speed.py           demo model and 135M Llama shape, float32
    python benchmarks/evaluation_speed.py --small   a smoke run in seconds

Two cases, each before and after an edit: the demo model with the probes of its own edits, and a
135M Llama shape with random weights and 100 ZsRE-length edits, asked its edit prompts. Ours is one
teacher-forced pass that verifies the answers it can, then decoding of the rest; theirs decodes all,
left-padded, sorted by length, with every stop token as `eos_token_id`. Both are timed after a run
that compiles. Answers must be the same token for token: exit status 1 if one is not. Needs torch
(the `test` extra).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

if __package__ in (None, ""):
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, hardware, llama_config, zsre_like
from benchmarks.tiny import tiny_model
from locft_jax import api
from locft_jax.config import DEMO_CONFIG, load_config
from locft_jax.data.capability import read_capability
from locft_jax.data.packing import Corpus
from locft_jax.data.requests import read_requests
from locft_jax.editing.run import agreed_budgets, choose_site
from locft_jax.editing.site import find_site, first_layer, read_site
from locft_jax.editing.step import Hyper, init_state
from locft_jax.editing.trainer import Job, Schedule, train
from locft_jax.evaluation.ask import ask, later_drafts, probe_cache
from locft_jax.evaluation.probes import NEW_TOKENS, make_probes, make_questions
from locft_jax.evaluation.scoring import matches, stop_tables
from locft_jax.evaluation.verify import ProbeCache, Prompts, answer
from locft_jax.io.delta import load_delta
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_model, load_weights
from locft_jax.model.activation_cache import cached_source
from locft_jax.model.model import Model
from locft_jax.model.sharding import make_mesh
from locft_jax.model.weights import Params, take_tensor

SEED, BATCH = 0, 64
ONE = {"data": 1, "model": 1}
Answered = tuple[list[Any], int]  # every answer, how many one pass verified


def torch_answers(
    torch: Any, model: Any, prompts: Sequence[Sequence[int]], stop: np.ndarray, device: str
) -> list[list[int]]:
    """transformers' greedy answers up to and including the stop token, in the order of `prompts`."""
    ids = np.flatnonzero(stop).tolist()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(prompts[i]) for i in chosen)
        tokens, seen = np.full((2, len(chosen), longest), [[[ids[0]]], [[0]]], np.int64)
        for row, i in enumerate(chosen):
            tokens[row, longest - len(prompts[i]) :] = prompts[i]
            seen[row, longest - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = model.generate(
                torch.tensor(tokens, device=device), attention_mask=torch.tensor(seen, device=device),
                max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ids, pad_token_id=ids[0],
            )  # fmt: skip
        for i, said in zip(chosen, out[:, longest:].tolist(), strict=True):
            answers[i] = until(said, stop)
    return answers


def until(tokens: list[int], stop: np.ndarray) -> list[int]:
    """Up to and including the first stop token."""
    return tokens[: next((n + 1 for n, t in enumerate(tokens) if stop[t]), len(tokens))]


def compare(
    case: str, when: str, ours: Callable[[], Answered], theirs: Callable[[], list[Any]], repeats: int
) -> dict[str, Any]:
    """Run both once to compile and to compare, then time them in turn; the best of each counts."""
    (tokens, verified), expected = ours(), theirs()
    different = [i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b]
    for i in different[:3]:
        print(f"  answer {i} differs: ours {tokens[i]}, transformers {expected[i]}")
    best = {ours: float("inf"), theirs: float("inf")}
    for _ in range(repeats):
        for side in best:
            begin = time.perf_counter()
            side()
            best[side] = min(best[side], time.perf_counter() - begin)
    row = {
        "case": case,
        "when": when,
        "probes": len(tokens),
        "hits": verified / len(tokens),
        "ours_seconds": best[ours],
        "transformers_seconds": best[theirs],
        "ratio": best[theirs] / best[ours],
        "different": len(different),
    }
    print(
        f"{case}, {when} editing: {row['ratio']:.2f} x transformers' generate; {len(tokens)} probes, "
        f"{100 * row['hits']:.0f} % verified by one pass; {len(different)} answers differ",
        flush=True,
    )
    return row


def torch_model(torch: Any, folder: str, device: str) -> Any:
    """The folder's model in float32, without generation settings of its own."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    model.generation_config = GenerationConfig()
    return model


def put(torch: Any, model: Any, overrides: Mapping[str, Any]) -> None:
    """Edited tensors into the torch model."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in overrides.items():
            named[name].copy_(torch.tensor(np.array(value, np.float32)))


def demo_case(
    torch: Any, folder: str | None, settings: list[str], delta: Path | None, sample: int, repeats: int,
    device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """A model folder (default: the demo model) with the demo's edits and all kinds of probes."""
    if folder is not None:
        settings = [f"model_name_or_path={folder}", *settings]
    config = load_config(DEMO_CONFIG, ["weights=float32", "evaluate=false", *settings])
    model = load_model(config.model_name_or_path, config.weights, ONE)
    data = read_requests(str(config.data_path), config.num_edits)
    free = [item for item in read_capability(config.capability_data) if not item.choices]
    probes = make_probes(data.requests, sample, SEED)
    asked = make_questions(model.tokenizer, probes, free[:sample], model.spec)
    site = choose_site(model.spec, config)
    before = model.with_overrides({n: np.asarray(take_tensor(model.params, n)) for n in site})
    after = model.apply(load_delta(delta)) if delta else api.edit(model, data, config).edited
    reference = torch_model(torch, config.model_name_or_path, device)
    official, eos_only = stop_tables(model.tokenizer, model.spec.vocab_size, model.eos)
    reliability = [p.kind == "reliability" for p in asked.probes]
    layer = first_layer(model.spec, site)
    caches: list[Any] = []

    def verdicts(tokens: list[list[int]], full: Sequence[str]) -> list[Any]:
        """An answer by the official stop rule; of an edited prompt also whether it matches until EOS."""
        return [
            (t, matches(f, str(p.target))) if r else t
            for t, f, p, r in zip(tokens, full, asked.probes, reliability, strict=True)
        ]

    def theirs() -> list[Any]:
        answers: list[list[int]] = [[] for _ in reliability]
        for until_eos, stop in ((True, eos_only), (False, official)):
            which = [i for i, r in enumerate(reliability) if r is until_eos]
            found = torch_answers(torch, reference, [asked.prompts[i] for i in which], stop, device)
            for i, tokens in zip(which, found, strict=True):
                answers[i] = tokens
        full = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return verdicts([until(a, official) for a in answers], full)

    first = ask(before, asked, None, config.row_length)
    rows = []
    mode, budgets = config.activation_cache, agreed_budgets(config)
    for when, now, drafts in (
        ("before", before, asked.targets),
        ("after", after, later_drafts(asked, first)),
    ):

        def ours(when: str = when, now: Model = now, drafts: Any = drafts) -> Answered:
            if when == "before":
                caches[:] = [probe_cache(model, asked, layer, mode, 0, budgets)]
            answers = ask(now, asked, drafts, config.row_length, cache=caches[0])
            return verdicts(answers.tokens, answers.full), answers.verified

        put(torch, reference, now.overrides)
        rows.append(compare("demo model" if folder is None else "model", when, ours, theirs, repeats))
    return rows


def memorize(model: Model, corpus: Corpus, layer: int, epochs: int) -> dict[str, Any]:
    """Edit the corpus into layer's `down_proj`. Random weights take a rate far above a real model's; in
    40 epochs of batches of 25 about 95 % of 100 edits are hit at the 135M shape."""
    params, mesh = model.params, model.mesh
    site = find_site(params.spec, ["model.layers.{}.mlp.down_proj.weight"], [layer])
    source = cached_source(params, corpus, layer, "device", mesh, 128)
    schedule = Schedule(min(25, len(corpus)), epochs, SEED, "example", 128, Hyper(1e-2, 0.0, 0.0))
    state = init_state(read_site(params, site, mesh, {}))
    done = train(Job(params, mesh, corpus, source, schedule), state)
    print(f"edited {len(corpus)}: loss {done.epoch_losses[0]:.2f} -> {done.epoch_losses[-1]:.3f}")
    return dict(done.state.theta)


def random_case(
    torch: Any, shape: str, layer: int, edits: int, epochs: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Random weights, random ZsRE-length edits, asked the edit prompts until EOS."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = llama_config(shape)
    settings.pop("model_type")
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
        reference = torch_model(torch, folder, device)
        checkpoint, mesh = open_folder(folder), make_mesh(ONE, jax.devices()[:1])
        model = Model(Params(checkpoint.spec, load_weights(checkpoint, mesh)), mesh, None, checkpoint)
    spec = checkpoint.spec
    corpus = zsre_like(edits, spec.vocab_size, SEED)
    texts = [t.tolist() for t in np.split(corpus.tokens, corpus.offsets[1:-1])]
    prompts = [t[:s] for t, s in zip(texts, corpus.target_start, strict=True)]
    drafts = [t[s:] for t, s in zip(texts, corpus.target_start, strict=True)]
    stop = np.zeros(spec.vocab_size, bool)
    stop[list(checkpoint.eos)] = True
    edited = memorize(model, corpus, layer, epochs)
    unedited = {n: take_tensor(model.params, n) for n in edited}

    caches: list[ProbeCache] = []
    rows = []
    for when, now in (("before", unedited), ("after", edited)):

        def ours(when: str = when, now: Any = now) -> Answered:
            if when == "before":
                caches[:] = [ProbeCache(layer, "device")]
            asked = Prompts(prompts, drafts, NEW_TOKENS, stop)
            return answer(model.with_overrides(now), asked, cache=caches[0])

        def theirs() -> list[list[int]]:
            return torch_answers(torch, reference, prompts, stop, device)

        put(torch, reference, now)
        rows.append(compare(f"{shape} shape", when, ours, theirs, repeats))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line a case, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny random models, for a smoke run")
    parser.add_argument("--cases", nargs="+", choices=("demo", "random"), default=["demo", "random"])
    parser.add_argument("--model", help="another folder than the demo model's, with the demo's edits")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="change the demo's config")
    parser.add_argument("--delta", type=Path, help="use this edit of the model instead of making one")
    parser.add_argument("--sample", type=int, default=1000, help="probes of each kind")
    parser.add_argument("--edits", type=int, default=100, help="edits of the random case")
    parser.add_argument("--layer", type=int, default=20, help="tuned layer of the random case")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the random case")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: what JAX finds")
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    args = parser.parse_args(argv)
    import torch

    if args.device is not None:
        jax.config.update("jax_platforms", "cuda" if args.device == "gpu" else "cpu")
    on = "cuda" if jax.default_backend() == "gpu" else "cpu"
    # A GPU would round products to fewer bits, and the answers would no longer be float32's.
    jax.config.update("jax_default_matmul_precision", "highest")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.small:
            small = ["num_edits=20", "batch_size=20", "num_epochs=20", "layer=2"]
            args = argparse.Namespace(**{**vars(args), "set": small, "sample": 12, "repeats": 1})
            args.model, args.edits, args.layer = str(tiny_model(Path(folder))), 20, 4
        if "demo" in args.cases:
            rows += demo_case(torch, args.model, args.set, args.delta, args.sample, args.repeats, on)
        if "random" in args.cases:
            shape = "tiny" if args.small else "135m"
            rows += random_case(torch, shape, args.layer, args.edits, args.epochs, args.repeats, on)
    finish({"benchmark": "evaluation_speed", "hardware": hardware(), "rows": rows}, args.out)
    different = sum(row["different"] for row in rows)
    if different:
        raise SystemExit(f"{different} answers differ: in float32 none may")


if __name__ == "__main__":
    main()

"""The Python API: what the commands do, in a few lines.

from locft_jax import load_model, edit, evaluate

model = load_model("path/or/hub-id")
result = edit(model, [{"prompt": "The capital of Nauru is", "target_new": "Yaren"}])
print(result.report["after"])
edited = model.apply(result.delta)
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from locft_jax.config import Config, config_to_dict
from locft_jax.data.capability import CapabilityItem
from locft_jax.data.requests import EditData, EditRequest, requests_from_records
from locft_jax.editing.augment import written_prefixes
from locft_jax.editing.checkpointer import Checkpointer
from locft_jax.editing.hooks import Progress
from locft_jax.editing.regularizers.preconditioner import check_preserve, told
from locft_jax.editing.regularizers.texts import retained_ids, retained_texts
from locft_jax.editing.run import EditTask, agreed_budgets, choose_site, encode_requests, run_edit
from locft_jax.editing.site import first_layer
from locft_jax.evaluation.ask import ask, differing_share, later_drafts, probe_cache
from locft_jax.evaluation.dynamics import Dynamics
from locft_jax.evaluation.probes import Answers, Questions, make_probes, prepare
from locft_jax.evaluation.scoring import agreement, by_batch, counts, figures, predictions, unreachable
from locft_jax.evaluation.verify import ProbeCache
from locft_jax.io.delta import Delta, make_delta
from locft_jax.io.hf_load import originals
from locft_jax.io.hf_save import to_checkpoint_dtype
from locft_jax.io.model_card import make_card, model_name
from locft_jax.logs import Bar
from locft_jax.model.model import Model
from locft_jax.model.weights import take_tensor
from locft_jax.versions import versions

# Keys that say nothing about the tensors of a delta: the same edit is the same bytes whatever they are.
UNTOLD = ("output_dir", "device", "memory_budget", "checkpoint_every", "export")


@dataclasses.dataclass(frozen=True)
class EditResult:
    """What an edit produced. `report`, `steps` and `predictions` have the fields of interfaces in
    the README; `delta` holds the tensors."""

    delta: Delta
    report: dict[str, Any]
    steps: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    edited: Model


def as_data(requests: EditData | Sequence[EditRequest | Mapping[str, Any]], config: Config) -> EditData:
    """Requests as `read_requests` gives them, from plain records or from itself."""
    if isinstance(requests, EditData):
        return requests
    return requests_from_records(requests, config.num_edits, config.on_conflict)


def edit(
    model: Model,
    requests: EditData | Sequence[EditRequest | Mapping[str, Any]],
    config: Config | None = None,
    capability: Sequence[CapabilityItem] = (),
    *,
    start: Mapping[str, Any] | None = None,
    checkpoints: Checkpointer | None = None,
    show: bool = False,
) -> EditResult:
    """Edit facts into a model by LocFT-BF and measure it before and after. Pure: `model` is not
    changed. Edits that it carries already stay, and are part of the new delta.

    `start`: values for the site's tensors to begin with (HF name -> matrix), such as an earlier
    delta's `new`; `checkpoints`: where the run's state is kept, and where it goes on if it was
    interrupted.

    Raises UserError for wrong input, FloatingPointError for a loss that is not finite, and
    Interrupted (a KeyboardInterrupt) when `checkpoints` was asked to stop.
    """
    config = config or Config()
    data = as_data(requests, config)
    site = choose_site(model.spec, config)
    prefixes = written_prefixes(model, config)
    corpus = encode_requests(model.tokenizer, data.requests, config, model.spec, prefixes)
    check_preserve(model.spec, site, config)
    retained = retained_ids(model, config, retained_texts(config, data.requests))
    seconds: dict[str, float | None] = dict.fromkeys(("load", "before", "edit", "after", "export"))

    asked = before = after = cache = None
    if config.evaluate:
        probes = make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases)
        asked = prepare(model.tokenizer, probes, capability, config.chat_template)
        # The site's own tensors as overrides: the same compiled code then serves before and after.
        own = {n: take_tensor(model.params, n) for n in site}
        unedited = model.with_overrides({**own, **originals(model, site), **model.overrides})
        kept = checkpoints and checkpoints.kept_before()
        if kept:
            before, seconds["before"] = Answers(**kept["answers"]), kept["seconds"]
        else:
            layer, beside = first_layer(model.spec, site), len(corpus.tokens)
            cache = probe_cache(model, asked, layer, config.activation_cache, beside, agreed_budgets(config))
            before = _ask(unedited, asked, None, config, "before", seconds, show, cache)
            if checkpoints is not None:
                kept = {"answers": dataclasses.asdict(before), "seconds": seconds["before"]}
                checkpoints.keep_before(kept)

    dynamics = None
    if config.eval_every and asked is not None and before is not None:
        dynamics = Dynamics(model, asked, before, config.row_length, cache)
        if checkpoints is not None:
            dynamics.lines, dynamics.keep = checkpoints.kept_dynamics() or [], checkpoints.keep_dynamics
    per_epoch = -(-corpus.edits // config.batch_size)
    with Bar("editing", per_epoch * config.num_epochs, show) as bar:
        what = "epoch" if config.pipeline == "breadth" else "mini-batch"
        hooks = [Progress(bar, corpus.edits / per_epoch, what)]
        task = EditTask(tuple(site), corpus, retained, start)
        done = run_edit(model, task, config, hooks, checkpoints, dynamics.look if dynamics else None)
    if dynamics is not None:
        done = dataclasses.replace(done, seconds=done.seconds - dynamics.seconds())
    seconds["edit"] = done.seconds

    edited = model.with_overrides(done.tensors)
    if asked is not None and before is not None:
        drafts = later_drafts(asked, before)
        after = _ask(edited, asked, drafts, config, "after", seconds, show, cache)
    report = _report(model, config, data, site, done, asked, before, after, seconds)
    report["boundary_merges"] = corpus.boundary_merges
    if asked is not None and after is not None:
        report["evaluation_differs"] = differing_share(edited, asked, after, config.row_length, config.seed)
    delta = make_delta(
        model.folder,
        {**to_checkpoint_dtype(model.folder, model.overrides), **done.tensors},
        {
            "config": {k: v for k, v in config_to_dict(config).items() if k not in UNTOLD},
            "data_sha256": data.sha256,
            "edits": len(data.requests),
            "versions": versions(),
            **({"preserve": report["preserve"]} if report["preserve"] else {}),
        },
    )
    card = make_card(model_name(model.folder, config.model_name_or_path), report, delta)
    delta = dataclasses.replace(delta, metadata={**delta.metadata, "cards": json.dumps([card])})
    report |= {
        "batches": _batches(data, asked, after),
        "dynamics": dynamics.lines if dynamics is not None else [],
        "fingerprint": delta.metadata["fingerprint"],
        "resumed": checkpoints.resumed if checkpoints is not None else [],
    }
    said = predictions(asked, before, after) if asked is not None else []
    steps = [dataclasses.asdict(record) for record in done.outcome.records]
    return EditResult(delta, report, steps, said, edited)


def _batches(data: EditData, asked: Questions | None, after: Answers | None) -> list[dict[str, Any]]:
    """Edits that came together (data/streaming.py; a plain run has one batch), and how they do."""
    sizes = Counter(r.batch for r in data.requests)
    count = 1 + max(sizes)
    rates = by_batch(asked, after, count) if asked and after else [{"reliability": None}] * count
    return [{"batch": b, "edits": sizes[b], **rates[b]} for b in range(count)]


def evaluate(
    model: Model,
    requests: EditData | Sequence[EditRequest | Mapping[str, Any]],
    capability: Sequence[CapabilityItem] = (),
    config: Config | None = None,
    *,
    show: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask a model (with the edits it carries) every probe: (figures 0-1, lines of predictions)."""
    config = config or Config()
    data = as_data(requests, config)
    asked = prepare(
        model.tokenizer,
        make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases),
        capability,
        config.chat_template,
    )
    seconds: dict[str, float | None] = {}
    answers = _ask(model, asked, None, config, "evaluating", seconds, show, None)
    report = {
        "edits": len(data.requests),
        "figures": figures(asked, answers),
        "probes": counts(asked),
        "unreachable_targets": sum(unreachable(r.target_new) for r in data.requests),
        "verified_by_one_pass": answers.verified,
        "evaluation_differs": differing_share(model, asked, answers, config.row_length, config.seed),
        "seconds": seconds["evaluating"],
    }
    return report, predictions(asked, None, answers)


def _ask(
    model: Model,
    asked: Questions,
    drafts: Sequence[Sequence[int]] | None,
    config: Config,
    label: str,
    seconds: dict[str, float | None],
    show: bool,
    cache: ProbeCache | None,
) -> Answers:
    begin = time.monotonic()
    with Bar(label, len(asked.probes), show) as bar:
        answers = ask(model, asked, drafts, config.row_length, bar.advance, cache)
    seconds[label] = time.monotonic() - begin
    return answers


def _report(
    model: Model,
    config: Config,
    data: EditData,
    site: Sequence[str],
    done: Any,
    asked: Questions | None,
    before: Answers | None,
    after: Answers | None,
    seconds: dict[str, float | None],
) -> dict[str, Any]:
    """The fields of report.json, rates 0-1, null where not measured."""
    nothing = dict.fromkeys(
        ("reliability", "generalization", "locality", "portability", "reliability_eos_only", "capability")
    )
    outcome = done.outcome
    return {
        "model": config.model_name_or_path or model.folder.name,
        "site": {"tensors": list(site), "parameters": done.parameters},
        "method": config.method,
        "pipeline": config.pipeline,
        "preserve": told(config, done.lambdas),
        "edits": len(data.requests),
        "duplicates": data.duplicates,
        "conflicts": len(data.conflicts),
        "conflicting_prompts": [{"prompt": p, "targets": t} for p, t in data.conflicts.items()],
        "unreachable_targets": sum(unreachable(r.target_new) for r in data.requests),
        "boundary_merges": None,
        "epochs_run": len(outcome.epoch_losses),
        "steps_run": len(outcome.records),
        "stopped": outcome.stopped,
        "epoch_losses": outcome.epoch_losses,
        "before": figures(asked, before) if asked and before else nothing,
        "after": {
            **(figures(asked, after) if asked and after else nothing),
            "locality_agreement": agreement(asked, before, after) if asked and before and after else None,
        },
        "probes": counts(asked) if asked else {},
        "seconds": seconds,
        "seconds_per_edit": done.seconds / len(data.requests),
        "tokens_per_second": sum(r.tokens for r in outcome.records) / done.seconds,
        "devices": [f"{d.platform} {d.device_kind}" for d in model.mesh.devices.flat],
        "mesh": dict(model.mesh.shape),
        "dtype": "int8" if model.int8 else str(model.dtype),
        "activation_cache": done.activation_cache,
        "evaluation_differs": None,
        "seed": config.seed,
        "versions": versions(),
        "config": json.loads(json.dumps(config_to_dict(config))),
        "data_sha256": data.sha256,
    }

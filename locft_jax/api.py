"""The Python API: what the commands do, in a few lines.

from locft_jax import load_model, edit, evaluate

model = load_model("path/or/hub-id")
result = edit(model, [{"prompt": "The capital of Nauru is", "target_new": "Yaren"}])
print(result.report["after"])
edited = model.apply(result.delta)
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locft_jax.config import Config
from locft_jax.data.capability import CapabilityItem
from locft_jax.data.requests import EditData, EditRequest, requests_from_records
from locft_jax.editing.checkpointer import Checkpointer
from locft_jax.editing.hooks import Hook, Progress
from locft_jax.editing.run import EditTask, agreed_budgets, run_edit
from locft_jax.editing.site import first_layer
from locft_jax.evaluation.ask import Dynamics, ask, differing_share, later_drafts, probe_cache
from locft_jax.evaluation.probes import Answers, Questions
from locft_jax.evaluation.report import ROWS
from locft_jax.evaluation.scoring import counts, figures, predictions, unreachable
from locft_jax.evaluation.verify import ProbeCache
from locft_jax.io.delta import Delta, load_delta, make_delta
from locft_jax.io.hf_load import originals
from locft_jax.io.hf_save import to_checkpoint_dtype
from locft_jax.io.model_card import make_card, model_name
from locft_jax.logs import Bar
from locft_jax.model.model import Model
from locft_jax.model.weights import take_tensor
from locft_jax.prepare import Base, Prepared, no_site, prepare
from locft_jax.report import Measured, delta_metadata, edit_report

Requests = EditData | Sequence[EditRequest | Mapping[str, Any]]
Figures = tuple[dict[str, Any], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class EditResult:
    """What an edit produced."""

    delta: Delta  # the tensors
    report: dict[str, Any]  # the fields of report.json
    steps: list[dict[str, Any]]  # the lines of steps.jsonl
    predictions: list[dict[str, Any]]  # and of predictions.jsonl
    edited: Model


def as_data(requests: Requests, config: Config) -> EditData:
    """Requests as `read_requests` gives them, from plain records or from itself."""
    if isinstance(requests, EditData):
        return requests
    return requests_from_records(requests, config.num_edits, config.on_conflict)


def edit(
    model: Model, requests: Requests, config: Config | None = None, capability: Sequence[CapabilityItem] = (),
    *, start: Mapping[str, Any] | None = None, hooks: Sequence[Hook] = (), show: bool = False,
) -> EditResult:  # fmt: skip
    """Edit facts into a model by LocFT-BF and measure it before and after. Pure: `model` is not changed.
    Raises UserError for wrong input, FloatingPointError for a loss that is not finite.

    Args:
        model: as `load_model` gives it. Overrides that it carries stay, and are part of the new delta.
        requests: plain records with a prompt and a target, or what `read_requests` found.
        config: the run's settings; its model and data are those given here.
        capability: questions that no edit is about.
        start: values for the site's tensors to begin with (HF name -> matrix), such as a delta's `new`.
        hooks: of the training loop.
        show: whether a bar tells of the progress.
    """
    config = config or Config()
    data = as_data(requests, config)
    prepared = prepare(config, data=data, capability=capability, base=Base.loaded(model))
    return edit_prepared(model, prepared, start, hooks=hooks, show=show)


def edit_prepared(
    model: Model, prepared: Prepared, start: Mapping[str, Any] | None = None,
    checkpointer: Checkpointer | None = None, hooks: Sequence[Hook] = (), show: bool = False,
) -> EditResult:  # fmt: skip
    """`edit` of a prepared run, from `start` or its `delta`, or resumed from what `checkpointer` keeps.
    Raises Interrupted (a KeyboardInterrupt) when asked to stop."""
    prepared = prepared.complete(model)
    config, questions, corpus = prepared.config, prepared.questions, prepared.corpus
    assert corpus is not None and prepared.retained is not None
    seconds: dict[str, float | None] = dict.fromkeys(("load", "before", "edit", "after", "export"))
    before = after = cache = dynamics = None
    if questions:
        before, seconds["before"], cache = _before(model, prepared, len(corpus.tokens), checkpointer, show)
    if questions and before and config.eval_every:
        dynamics = Dynamics(model, questions, before, config.row_length, cache)
        if checkpointer:
            dynamics.lines = checkpointer.kept("dynamics") or []
            dynamics.keep = functools.partial(checkpointer.keep, "dynamics")
    per_epoch = -(-corpus.edits // config.batch_size)
    with Bar("editing", per_epoch * config.num_epochs, show) as bar:
        what = "epoch" if config.pipeline == "breadth" else "mini-batch"
        hooks = [Progress(bar, corpus.edits / per_epoch, what), *hooks]
        start = prepared.delta.new if start is None and prepared.delta else start
        task = EditTask(prepared.site, corpus, prepared.retained, start)
        done = run_edit(model, task, config, hooks, checkpointer, dynamics.look if dynamics else None)
    done = dataclasses.replace(done, seconds=done.seconds - (dynamics.seconds() if dynamics else 0))
    seconds["edit"] = done.seconds
    edited = model.with_overrides(done.tensors)
    if questions and before:
        drafts = later_drafts(questions, before)
        after, seconds["after"] = _ask(edited, questions, drafts, config, "after", show, cache)
    measured = Measured(questions, before, after)
    report = edit_report(model, prepared, done, measured, seconds)
    if questions and after:
        differs = differing_share(edited, questions, after, config.row_length, config.seed)
        report["evaluation_differs"] = differs
    report["dynamics"] = dynamics.lines if dynamics else []
    report["resumed"] = checkpointer.resumed if checkpointer else []
    tensors = {**to_checkpoint_dtype(model.folder, model.overrides), **done.tensors}
    delta = make_delta(model.folder, tensors, delta_metadata(prepared, report))
    report["fingerprint"] = delta.metadata["fingerprint"]
    card = make_card(model_name(model.folder, config.model_name_or_path), report, delta, ROWS)
    delta = dataclasses.replace(delta, metadata={**delta.metadata, "cards": json.dumps([card])})
    steps = [dataclasses.asdict(record) for record in done.outcome.records]
    said = predictions(questions, before, after) if questions else []
    return EditResult(delta, report, steps, said, edited)


def _before(
    model: Model, prepared: Prepared, beside: int, checkpointer: Checkpointer | None, show: bool
) -> tuple[Answers, float, ProbeCache | None]:
    """The unedited model's answers, their seconds, and room for what later passes can share, `beside` the
    activations of so many training tokens."""
    if checkpointer and (kept := checkpointer.kept("before")):
        return Answers(**kept["answers"]), kept["seconds"], None
    config, questions, site = prepared.config, prepared.questions, prepared.site
    assert questions is not None
    # The site's own tensors as overrides: the same compiled code then serves before and after.
    own = {n: take_tensor(model.params, n) for n in site}
    unedited = model.with_overrides({**own, **originals(model, site), **model.overrides})
    budgets, layer = agreed_budgets(config), first_layer(model.spec, site)
    cache = probe_cache(model, questions, layer, config.activation_cache, beside, budgets)
    answers, seconds = _ask(unedited, questions, None, config, "before", show, cache)
    if checkpointer:
        checkpointer.keep("before", {"answers": dataclasses.asdict(answers), "seconds": seconds})
    return answers, seconds, cache


def evaluate(
    model: Model, requests: Requests, capability: Sequence[CapabilityItem] = (), config: Config | None = None,
    *, show: bool = False,
) -> Figures:  # fmt: skip
    """Ask a model, with the overrides that it carries, every probe. Raises UserError for wrong input.

    Args:
        model: as `load_model` or `model.apply` gives it.
        requests: the edits whose probes are asked.
        capability: questions that no edit is about.
        config: the settings of the evaluation.
        show: whether a bar tells of the progress.

    Returns:
        Figures 0-1 with counts, and a line for every probe as in predictions.jsonl.
    """
    config = config or Config()
    data = as_data(requests, config)
    prepared = prepare(config, data=data, capability=capability, sites=no_site, base=Base.loaded(model))
    return evaluate_prepared(model, prepared, show)


def evaluate_prepared(model: Model, prepared: Prepared, show: bool = False) -> Figures:
    """`evaluate` of a run that has been looked at."""
    config, questions = prepared.config, prepared.questions
    assert questions is not None
    answers, seconds = _ask(model, questions, None, config, "evaluating", show)
    report = {
        "edits": len(prepared.data.requests),
        "figures": figures(questions, answers),
        "probes": counts(questions),
        "unreachable_targets": sum(unreachable(r.target_new) for r in prepared.data.requests),
        "verified_by_one_pass": answers.verified,
        "evaluation_differs": differing_share(model, questions, answers, config.row_length, config.seed),
        "seconds": seconds,
    }
    return report, predictions(questions, None, answers)


def _ask(
    model: Model, questions: Questions, drafts: Sequence[Sequence[int]] | None, config: Config,
    label: str, show: bool, cache: ProbeCache | None = None,
) -> tuple[Answers, float]:  # fmt: skip
    """Answers, and the seconds they took."""
    begin = time.monotonic()
    with Bar(label, len(questions.probes), show) as bar:
        answers = ask(model, questions, drafts, config.row_length, bar.advance, cache)
    return answers, time.monotonic() - begin


def apply_delta(model: Model, delta: Delta | str | Path) -> Model:
    """The model with a delta (or the file of one) in place. Raises UserError where it was made on another."""
    return model.apply(delta if isinstance(delta, Delta) else load_delta(delta))

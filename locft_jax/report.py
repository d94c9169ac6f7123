"""What is reported of an edit, in plain JSON types: report.json, and what a delta says of itself."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from locft_jax.config import config_to_dict
from locft_jax.editing.regularizers.preconditioner import describe
from locft_jax.editing.run import Edited
from locft_jax.evaluation.probes import Answers, Questions
from locft_jax.evaluation.scoring import agreement, by_batch, counts, figures, unreachable
from locft_jax.model.model import Model
from locft_jax.prepare import Prepared
from locft_jax.run_identity import versions

# Keys that say nothing about the tensors of a delta: the same edit is the same bytes whatever they are.
NOT_OF_A_DELTA = ("output_dir", "device", "memory_budget", "checkpoint_every", "export", "report_to")
RATES = ("reliability", "generalization", "locality", "portability", "reliability_eos_only", "capability")


@dataclass(frozen=True)
class Measured:
    """What a model answered before and after an edit; None where it was not asked."""

    questions: Questions | None = None
    before: Answers | None = None
    after: Answers | None = None

    def rates(self, answers: Answers | None) -> dict[str, float | None]:
        """Figures 0-1, None where not measured."""
        return figures(self.questions, answers) if self.questions and answers else dict.fromkeys(RATES)

    def agreement(self) -> float | None:
        """Share of locality probes whose answer did not change."""
        questions, before, after = self.questions, self.before, self.after
        return agreement(questions, before, after) if questions and before and after else None


def edit_report(
    model: Model, prepared: Prepared, done: Edited, measured: Measured, seconds: Mapping[str, float | None]
) -> dict[str, Any]:
    """The fields of report.json: rates 0-1, None where not measured."""
    config, data, outcome, questions = prepared.config, prepared.data, done.outcome, measured.questions
    after = {**measured.rates(measured.after), "locality_agreement": measured.agreement()}
    return {
        "model": config.model_name_or_path or model.folder.name,
        "site": {"tensors": list(prepared.site), "parameters": done.parameters},
        "method": config.method, "pipeline": config.pipeline, "preserve": describe(config, done.lambdas),
        "edits": len(data.requests), "duplicates": data.duplicates, "conflicts": len(data.conflicts),
        "conflicting_prompts": [{"prompt": p, "targets": t} for p, t in data.conflicts.items()],
        "unreachable_targets": sum(unreachable(r.target_new) for r in data.requests),
        "boundary_merges": prepared.corpus.boundary_merges if prepared.corpus else None,
        "epochs_run": len(outcome.epoch_losses), "steps_run": len(outcome.records),
        "stopped": outcome.stopped, "epoch_losses": outcome.epoch_losses,
        "before": measured.rates(measured.before), "after": after,
        "probes": counts(questions) if questions else {},
        "seconds": dict(seconds), "seconds_per_edit": done.seconds / len(data.requests),
        "tokens_per_second": sum(r.tokens for r in outcome.records) / done.seconds,
        "devices": [f"{d.platform} {d.device_kind}" for d in model.mesh.devices.flat],
        "mesh": dict(model.mesh.shape), "dtype": "int8" if model.int8 else str(model.dtype),
        "activation_cache": done.activation_cache, "evaluation_differs": None,
        "seed": config.seed, "versions": versions(),
        "config": json.loads(json.dumps(config_to_dict(config))),
        "data_sha256": data.sha256, "batches": _batches(prepared, measured),
    }  # fmt: skip


def delta_metadata(prepared: Prepared, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a delta says of itself. It names no path."""
    config = {k: v for k, v in config_to_dict(prepared.config).items() if k not in NOT_OF_A_DELTA}
    known = {"config": config, "data_sha256": prepared.data.sha256, "edits": len(prepared.data.requests)}
    return known | {k: report[k] for k in ("versions", "preserve") if report[k]}


def _batches(prepared: Prepared, measured: Measured) -> list[dict[str, Any]]:
    """Edits that came together (data/streaming.py; a plain run has one batch), and how they do."""
    sizes = Counter(r.batch for r in prepared.data.requests)
    rates: list[Any] = [{"reliability": None}] * (1 + max(sizes))
    if measured.questions and measured.after:
        rates = by_batch(measured.questions, measured.after, len(rates))
    return [{"batch": b, "edits": sizes[b], **own} for b, own in enumerate(rates)]

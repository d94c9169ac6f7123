"""Edits that arrive over time: those of an earlier run and new ones as one set to retrain on (streaming
breadth-first). Every run leaves its requests in `edits.jsonl`; each keeps the number of its arrival."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locft_jax.config import canonical
from locft_jax.data.records import open_records
from locft_jax.data.requests import EditData, EditRequest, requests_from_records
from locft_jax.errors import UserError, cause
from locft_jax.io.remote import open_file


def to_record(request: EditRequest) -> dict[str, Any]:
    """A line of edits.jsonl; `read_requests` gives an equal request back."""
    pairs = lambda probes: [{"prompt": p, "ground_truth": a} for p, a in probes]  # noqa: E731
    return {
        "case_id": request.case,
        **{name: getattr(request, name) for name in ("prompt", "target_new", "subject", "ground_truth")},
        "rephrase_prompts": list(request.rephrases), "locality_probes": pairs(request.locality),
        "portability_probes": pairs(request.portability), "batch": request.batch,
    }  # fmt: skip


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left: its requests, its report, and the folder."""

    folder: str | Path
    requests: list[EditRequest]
    report: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings, for a run that adds to it: not its data, and not its place."""
        settings = canonical(self.report["config"], f"{self.folder}/report.json")  # version 0.1 wrote aliases
        return {k: v for k, v in settings.items() if k not in ("data_path", "num_edits", "output_dir")}

    @property
    def curve(self) -> list[list[float | None]]:
        """Reliability of every batch after each run so far: curve[run][batch]."""
        streaming = self.report.get("streaming") or {"curve": [[self.report["after"]["reliability"]]]}
        return [list(row) for row in streaming["curve"]]


def read_earlier(folder: str | Path) -> Earlier:
    """The requests and the report of a finished run, here or at a URL. Raises UserError if there is none."""
    try:
        with open_file(f"{folder}/report.json") as file:
            report = json.loads(file.read())
        report["after"]["reliability"], report["config"]["seed"]
        records = [record.value for record in open_records(f"{folder}/edits.jsonl")[1]]
        batches = [int(record["batch"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as e:
        wrong = f"--continue-from: {folder} holds no finished run (it needs report.json and edits.jsonl)"
        raise UserError(f"{wrong}: {cause(e)}") from None
    requests = requests_from_records(records).requests
    if len(requests) != len(records) or min(batches, default=-1) < 0:
        raise UserError(f"--continue-from: {folder}/edits.jsonl was changed: it must be as the run left it")
    requests = [dataclasses.replace(r, batch=b) for r, b in zip(requests, batches, strict=True)]
    return Earlier(folder, requests, report)


def extend(earlier: Earlier, new: EditData) -> EditData:
    """All requests, earlier ones first. A new one supersedes one with the same prompt and another target; one
    that was made already is a duplicate. Raises UserError if none is new."""
    said = lambda r: (r.prompt.strip(), r.target_new.strip())  # noqa: E731
    batch = 1 + max(r.batch for r in earlier.requests)
    made = {said(r) for r in earlier.requests}
    fresh = [dataclasses.replace(r, batch=batch) for r in new.requests if said(r) not in made]
    if not fresh:
        wrong = f"data_path: all {len(new.requests)} edits of {new.source} are in {earlier.folder} already"
        raise UserError(f"{wrong}; give new ones")
    prompts = {said(r)[0] for r in fresh}
    kept = [r for r in earlier.requests if said(r)[0] not in prompts]
    digest = hashlib.sha256(new.sha256.encode())
    for r in kept:
        digest.update(json.dumps(to_record(r), sort_keys=True).encode() + b"\n")
    duplicates = new.duplicates + len(new.requests) - len(fresh)
    return EditData([*kept, *fresh], duplicates, new.conflicts, new.source, digest.hexdigest())


def streaming_report(earlier: Earlier, batches: Sequence[Mapping[str, Any]], start: str) -> dict[str, Any]:
    """report.json's `streaming`: what became of the earlier edits. `batches`: the report's own."""
    *sizes, new = (int(b["edits"]) for b in batches)
    return {
        "continued_from": str(earlier.folder), "start_from": start,
        "earlier_edits": sum(sizes), "new_edits": new, "superseded": len(earlier.requests) - sum(sizes),
        "curve": [*earlier.curve, [b["reliability"] for b in batches]],
    }  # fmt: skip

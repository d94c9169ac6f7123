"""What a run's result follows from: whether another run may resume from it, and which libraries made it."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from locft_jax.config import ALIASES, Config, canonical, config_to_dict
from locft_jax.data.capability import CapabilityItem
from locft_jax.data.records import digest
from locft_jax.data.requests import EditData
from locft_jax.editing.augment import prefix_texts
from locft_jax.errors import UserError
from locft_jax.io.atomic import read_json
from locft_jax.io.delta import Delta, fingerprint
from locft_jax.io.hf_folder import HFFolder, read_part, read_tensor
from locft_jax.io.outputs import saved_something
from locft_jax.io.remote import Remote, in_parallel
from locft_jax.logs import log

# Keys that change nothing in a run's result: what they were may differ when a run goes on.
FREE_KEYS = ("model_name_or_path", "data_path", "output_dir", "capability_data", "device",
             "memory_budget", "checkpoint_every", "export", "report_to")  # fmt: skip


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in ("locft-jax", "jax", "jaxlib", "flax", "optax", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def base_digest(checkpoint: HFFolder, site: Sequence[str]) -> str:
    """sha256 that tells one base model from another without reading it all: every tensor's name,
    dtype, shape and first row, and the whole of the site's tensors."""
    own = {n: read_tensor(checkpoint, n) for n in site}
    sha256 = hashlib.sha256(fingerprint(checkpoint.layout, own).encode())

    def first_row(name: str) -> bytes:
        shape = checkpoint.tensors[name].shape  # a buffer without elements or dimensions has no first row
        return read_part(
            checkpoint, name, tuple(slice(1 if d == 0 else None) for d in range(len(shape)))
        ).tobytes()

    names = sorted(checkpoint.tensors, key=lambda n: (checkpoint.tensors[n].file, n))
    for row in in_parallel(first_row, names):
        sha256.update(row)
    return sha256.hexdigest()


def describe_run(
    config: Config,
    data: EditData,
    capability: Sequence[CapabilityItem],
    checkpoint: HFFolder,
    site: Sequence[str],
    mesh: Mesh,
    start: Delta | None = None,
    retained: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All that a run's result follows from, in JSON types: another run must not go on from it."""
    return {
        **{k: v for k, v in config_to_dict(config).items() if k not in FREE_KEYS},
        "mesh": dict(mesh.shape),
        "site": list(site),
        "data_sha256": data.sha256,
        "capability": digest([dataclasses.asdict(item) for item in capability]),
        "base_model": base_digest(checkpoint, site),
        "architecture": digest([dataclasses.asdict(checkpoint.spec)]),
        "preserve_texts": digest([{"text": text} for text in retained or ()]),
        "augment_texts": digest([{"text": text} for text in prefix_texts(config)]),
        "start": start and digest([{n: a.tobytes().hex() for n, a in start.new.items()}]),
        "versions": versions(),
    }


def finished(out: Path, run: Mapping[str, Any], store: Remote | None = None) -> bool:
    """Whether `out`, or `store`, holds this run's results and nothing to go on from. Raises UserError where
    the results are those of another run."""
    if store and (store / "report.json").exists():
        report = json.loads((store / "report.json").read())
    else:
        report = read_json(out / "report.json")
    if not isinstance(report, dict) or saved_something(out / "checkpoint"):
        return False
    found = {**report.get("config", {}), "data_sha256": report.get("data_sha256")}
    found = {k: v for k, v in found.items() if ALIASES.get(k, k) in run and k != "mesh"}
    check_same(found, run, store or out)
    return True


def check_same(found: Mapping[str, Any], run: Mapping[str, Any], where: Path | Remote) -> None:
    """Raise UserError naming what differs between the run that was `found` and this one."""
    run, found = json.loads(json.dumps(run)), canonical(found, str(where))  # 0.1 wrote aliases
    differ = [
        f"{key}: {json.dumps(value)[:80]} there, {json.dumps(run.get(key))[:80]} here"
        for key, value in sorted(found.items())
        if value != run.get(key) and key != "versions"
    ]
    if differ:
        lines = "\n  ".join(differ)
        raise UserError(
            f"--resume: {where} is of another run:\n  {lines}\n"
            "use the settings, data and model of that run, or another --out"
        )
    if "versions" in found and found["versions"] != run["versions"]:
        log.warning("resuming with other versions of the libraries: the result may differ in its last bits")

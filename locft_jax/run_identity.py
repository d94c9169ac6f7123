"""What a run's result follows from: whether another run may resume from it, and which libraries made it."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from locft_jax.config import ALIASES, canonical
from locft_jax.errors import UserError
from locft_jax.io.atomic import read_json
from locft_jax.io.delta import fingerprint
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
    """sha256 that tells one base model from another without reading it all: every tensor's name, dtype, shape
    and first row, and the whole of the site's tensors."""
    own = {n: read_tensor(checkpoint, n) for n in site}
    sha256 = hashlib.sha256(fingerprint(checkpoint.layout, own).encode())

    def first_row(name: str) -> bytes:  # a buffer without elements or dimensions has none
        rank = len(checkpoint.tensors[name].shape)
        return read_part(checkpoint, name, (slice(1), *[slice(None)] * (rank - 1))[:rank]).tobytes()

    names = sorted(checkpoint.tensors, key=lambda n: (checkpoint.tensors[n].file, n))
    for row in in_parallel(first_row, names):
        sha256.update(row)
    return sha256.hexdigest()


def finished(out: Path, run: Mapping[str, Any], store: Remote | None = None) -> bool:
    """Whether this run is there, finished. Raises UserError where the results are those of another run."""
    kept = store / "report.json" if store else None
    report = json.loads(kept.read()) if kept and kept.exists() else read_json(out / "report.json")
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
        lines = "\n  ".join([f"--resume: {where} is of another run:", *differ])
        raise UserError(f"{lines}\nuse the settings, data and model of that run, or another --out")
    if "versions" in found and found["versions"] != run["versions"]:
        log.warning("resuming with other versions of the libraries: the result may differ in its last bits")

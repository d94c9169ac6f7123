"""Second moments kept on the disk between runs: those of one model, site and set of texts never change.

One file a key in `$XDG_CACHE_HOME/locft_jax/moments` (else `~/.cache/...`), which may be deleted at any time.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from locft_jax.data.records import digest
from locft_jax.editing.regularizers.second_moments import Leading, Moments
from locft_jax.errors import reason
from locft_jax.io.atomic import whole_file
from locft_jax.logs import log
from locft_jax.model.sharding import fetch

MOST = 4 * 2**30  # bytes of all files


def folder() -> Path:
    """Where the files are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locft_jax" / "moments"


def remembered(key: Mapping[str, Any], compute: Callable[[], Moments]) -> Moments:
    """The moments that were computed under this `key` (JSON types: all that they follow from), else those of
    `compute`, kept for the next time, the oldest files making room. A file that cannot be read or written is
    no error."""
    path = folder() / f"{digest([dict(key)])}.safetensors"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, SafetensorError):
        found = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(_bytes(found))
        _make_room(path)
    except OSError as e:
        log.warning(f"second moments could not be kept in {path.parent} ({reason(e)}): computed anew")
    return found


def _make_room(newest: Path) -> None:
    """Delete the oldest files beyond MOST bytes in all."""
    files = sorted(newest.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = newest.stat().st_size
    for path in files:
        if path != newest:
            total += path.stat().st_size
            if total > MOST:
                path.unlink(missing_ok=True)


def _bytes(moments: Moments) -> bytes:
    """Every moment once, with the names that share it."""
    unique = {id(m): m for m in moments.values()}
    number = {key: i for i, key in enumerate(unique)}
    tensors: dict[str, np.ndarray] = {}
    traces: dict[str, float] = {}
    for key, moment in unique.items():
        i = str(number[key])
        if isinstance(moment, Leading):
            traces[i] = moment.trace
            tensors |= {f"{i}.vectors": np.ascontiguousarray(moment.vectors), f"{i}.values": moment.values}
        else:
            tensors[i] = fetch(moment)
    names = {name: str(number[id(m)]) for name, m in moments.items()}
    return save(tensors, metadata={"names": json.dumps(names), "traces": json.dumps(traces)})


def _read(path: Path) -> Moments:
    with safe_open(path, "np") as file:
        about = file.metadata()
        names, traces = json.loads(about["names"]), json.loads(about["traces"])
        made: dict[str, Any] = {}
        for i in names.values():
            if i in made:
                continue
            if i in traces:
                values = np.ascontiguousarray(file.get_tensor(f"{i}.values"))
                made[i] = Leading(file.get_tensor(f"{i}.vectors"), values, traces[i])
            else:
                made[i] = file.get_tensor(i)
    return {name: made[i] for name, i in names.items()}

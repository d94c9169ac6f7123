"""Second moments kept on the disk between runs: those of one model, site and set of texts never change.

One file a key in `$XDG_CACHE_HOME/locft_jax/moments` (else `~/.cache/...`), which may be deleted at any time.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from locft_jax.data.records import digest
from locft_jax.editing.regularizers.second_moments import Leading, Moments
from locft_jax.errors import reason
from locft_jax.io.atomic import whole_file
from locft_jax.logs import log
from locft_jax.model.sharding import fetch

MOST = 4 * 2**30  # bytes of all files


def remembered(key: Mapping[str, Any], compute: Callable[[], Moments]) -> Moments:
    """The moments that were computed under this `key` (JSON types: all that they follow from), else those of
    `compute`, kept for the next time, the oldest files making room. A file that cannot be read or written is
    no error."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "locft_jax" / "moments" / f"{digest([dict(key)])}.npz"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        found = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part, part.open("wb") as file:
            _write(file, found)
        files = sorted(path.parent.glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
        sizes = np.cumsum([p.stat().st_size for p in files])
        for old in [p for p, total in zip(files[1:], sizes[1:], strict=True) if total > MOST]:
            old.unlink(missing_ok=True)
    except OSError as e:
        log.warning(f"second moments cannot be kept in {path.parent} ({reason(e)}): every run computes them")
    return found


def _write(file: Any, moments: Moments) -> None:
    """Every moment once, and which names share it."""
    unique = {id(m): m for m in moments.values()}
    number = {key: str(i) for i, key in enumerate(unique)}
    arrays = {"names": np.array(json.dumps({name: number[id(m)] for name, m in moments.items()}))}
    for key, moment in unique.items():
        parts = dataclasses.asdict(moment) if isinstance(moment, Leading) else {"whole": fetch(moment)}
        arrays |= {f"{number[key]}.{part}": np.asarray(value) for part, value in parts.items()}
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> Moments:
    with np.load(path, allow_pickle=False) as file:
        names: dict[str, str] = json.loads(str(file["names"]))

        def moment(i: str) -> Any:
            if f"{i}.whole" in file:
                return file[f"{i}.whole"]
            return Leading(file[f"{i}.vectors"], file[f"{i}.values"], float(file[f"{i}.trace"]))

        made = {i: moment(i) for i in dict.fromkeys(names.values())}
    return {name: made[i] for name, i in names.items()}

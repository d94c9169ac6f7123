"""Programs that are compiled during a run: counted, and kept for a process that resumes it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

COMPILED = "/jax/core/compile/backend_compile_duration"  # once a program, out of the cache or not
CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def compilations(folder: Path | None) -> Iterator[Counter[str]]:
    """Count programs by the name of their function. They are kept in `folder`, unless the user has set a
    cache or it is None."""
    count: Counter[str] = Counter()
    old = {name: getattr(jax.config, name) for name in CACHE}
    own = folder is not None and old["jax_compilation_cache_dir"] is None

    def on_duration(event: str, duration_secs: float, **more: Any) -> None:
        if event == COMPILED:
            name = str(more.get("fun_name", ""))  # add, jit_add or jit(add)
            count[name.removeprefix("jit").strip("_()")] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        if own:
            _configure({**CACHE, "jax_compilation_cache_dir": str(folder)})
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        if own:
            _configure(old)


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # which cache there is is looked at once

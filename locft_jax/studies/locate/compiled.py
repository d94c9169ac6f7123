"""jax's persistent compilation cache around a run, and how many programs were compiled."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

COMPILED = "/jax/core/compile/backend_compile_duration"  # once a program, wherever it came from
FOUND = "/jax/compilation_cache/cache_hits"
OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Compilations:
    """Programs by the name of their function: `made` by the compiler, `found` in the cache."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.hit = False

    def on_event(self, event: str, **_: Any) -> None:
        self.hit = self.hit or event == FOUND

    def on_duration(self, event: str, duration_secs: float, **more: Any) -> None:
        if event == COMPILED:
            name = str(more.get("fun_name", "")).removeprefix("jit_").removeprefix("jit(").removesuffix(")")
            (self.found if self.hit else self.made)[name] += 1
            self.hit = False

    def __str__(self) -> str:
        steps, rest = self.made["train_step"], self.made.total() - self.made["train_step"]
        text = f"{steps} training steps and {rest} other programs were compiled"
        return f"{text}, {self.found.total()} came from the cache" if self.found else text


@contextmanager
def counted(folder: Path | None) -> Iterator[Compilations]:
    """Programs that are compiled inside are kept in `folder`, if there is one, for a process that goes on,
    and counted. A cache that the user has set is used instead."""
    count, old = Compilations(), {name: getattr(jax.config, name) for name in OPTIONS}
    own = folder is not None and getattr(jax.config, "jax_compilation_cache_dir", None) is None
    if folder is not None and own:
        folder.mkdir(parents=True, exist_ok=True)
        _use(str(folder), OPTIONS)
    jax.monitoring.register_event_listener(count.on_event)
    jax.monitoring.register_event_duration_secs_listener(count.on_duration)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_listener(count.on_event)
        jax.monitoring.unregister_event_duration_listener(count.on_duration)
        if own:
            _use(None, old)


def _use(folder: str | None, options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # which cache there is is looked at once

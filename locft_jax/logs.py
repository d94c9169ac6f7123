"""The package's logger, its handler for a terminal, and a progress bar with ETA."""

import logging
import sys
from typing import Any

from tqdm import tqdm

from locft_jax.errors import printable

LINE_EVERY = 10.0  # seconds between progress lines where stderr is no terminal
PLAIN = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %), {elapsed} gone, {remaining} left{postfix}"

log = logging.getLogger("locft_jax")


class Terminal(logging.Handler):
    """Plain lines on stderr: a warning is a note to the user. Records of other libraries take one line."""

    def emit(self, record: logging.LogRecord) -> None:
        text, library = record.getMessage(), record.name.split(".")[0]
        if library != log.name:
            if record.levelno < logging.ERROR and library != "jax":
                return
            text = f"{library}: {text.splitlines()[0][:200] if text else ''}"
        mark = "note: " if record.levelno == logging.WARNING else ""
        print(f"{mark}{printable(text)}", file=sys.stderr, flush=True)


def log_to_terminal() -> None:
    """For commands: notes and progress of this package and warnings of others, on stderr."""
    if not any(isinstance(handler, Terminal) for handler in logging.root.handlers):
        logging.root.addHandler(Terminal())
    log.setLevel(logging.INFO)


class Lines:
    """A file for tqdm: what would overwrite the line before becomes a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


class Bar(tqdm):
    """`with Bar("editing", total) as bar: bar.advance(n, "loss 0.1")`: a bar on a terminal, elsewhere a line
    now and then; nothing without `show`, or where another process of the run speaks."""

    monitor_interval = 0  # no thread of its own
    n: int
    last_print_n: int
    warm: tuple[float, int] | None = None  # when, and with how many units, the first ones were done

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
        if not sys.stderr.isatty():
            options = {"file": Lines(), "bar_format": PLAIN, "mininterval": LINE_EVERY, "delay": LINE_EVERY}
        shown = show and log.isEnabledFor(logging.WARNING)
        super().__init__(desc=label, total=max(1, total), miniters=1, disable=not shown, **options)

    def skip(self, count: int = 1) -> None:
        """`count` units were done earlier."""
        if not self.disable:
            self.n, self.last_print_n = self.n + count, self.last_print_n + count
            self.warm = self.warm and (self.warm[0], self.warm[1] + count)

    def rate(self) -> float:
        """Units a second since the first ones, which compile; 0 until then, or where nothing is shown."""
        return (self.n - self.warm[1]) / max(1e-9, self._time() - self.warm[0]) if self.warm else 0.0

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "rate": self.rate()}

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` stands behind the bar."""
        if not self.disable:
            self.set_postfix_str(note, refresh=False)
            self.update(count)
            if self.warm is None and count:
                self.warm = self._time(), self.n

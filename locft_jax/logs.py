"""Progress with ETA: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from locft_jax.errors import printable

LINE_EVERY = 10.0  # seconds between plain lines
quiet = False  # set where another process of the same run speaks (hosts.py)


def say(text: str) -> None:
    """A note that a run gives on its way."""
    if not quiet:
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)


class Bar:
    """`with Bar("editing", total) as bar: bar.advance(n, "loss 0.1")`; quiet when `show` is false."""

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        self.label, self.total, self.done, self.skipped = label, max(1, total), 0, 0
        self.begin = self.said = time.monotonic()
        show = show and not quiet
        self.tty = show and sys.stderr.isatty()
        self.plain = show and not self.tty
        if self.tty:
            from rich.console import Console

            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(label, total=self.total, note="")

    def __enter__(self) -> "Bar":
        if self.tty:
            self.bar.start()
        return self

    def skip(self, count: int = 1) -> None:
        """`count` units were done earlier: they count as done, but not for the rate."""
        self.done, self.skipped = self.done + count, self.skipped + count
        if self.tty:
            self.bar.update(self.task, completed=self.done)

    def rate(self) -> float:
        """Units a second so far."""
        return (self.done - self.skipped) / max(1e-9, time.monotonic() - self.begin)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` stands behind the bar."""
        self.done += count
        now = time.monotonic()
        if self.tty:
            self.bar.update(self.task, advance=count, note=note)
        elif self.plain and now - self.said >= LINE_EVERY:
            self.said = now
            left = (self.total - self.done) / max(1e-9, self.rate())
            share = 100 * self.done // self.total
            print(
                f"{self.label}: {self.done}/{self.total} ({share} %)  {left:.0f} s left  {note}",
                file=sys.stderr,
            )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tty:
            self.bar.stop()
        elif self.plain and time.monotonic() - self.begin >= LINE_EVERY:
            print(f"{self.label}: {self.done} in {time.monotonic() - self.begin:.0f} s", file=sys.stderr)

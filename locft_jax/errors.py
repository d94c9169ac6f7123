"""What the user got wrong: commands print it without a traceback and exit with status 2."""

import itertools
from collections.abc import Sequence


class UserError(Exception):
    """Wrong input. The message says what is wrong, where, and what would be right."""


def refuse(head: str, wrong: Sequence[str], most: int = 10) -> None:
    """Raise UserError if anything is wrong: on one line, or a list that fits a screen."""
    if len(wrong) == 1:
        raise UserError(f"{head}: {wrong[0]}")
    if wrong:
        more = [f"... and {len(wrong) - most} more"] if len(wrong) > most else []
        raise UserError("\n  ".join([f"{head}:", *wrong[:most], *more]))


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library gave up: pyo3's PanicException is no Exception, and cannot be imported."""
    return type(error).__name__ == "PanicException"


def reason(error: Exception) -> str:
    """What an error of another library says, in one line: the end of a long one, where causes stand."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"...{text[-200:]}"


def cause(error: BaseException, most: int = 200) -> str:
    """An error of another library with its type, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def printable(text: object) -> str:
    """Text for a terminal: invisible characters, which could move the cursor, become spaces; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in str(text))


def one_screen(text: object, rows: int = 22, width: int = 80) -> str:
    """`printable` text of so many rows: a long line keeps both ends, a long text first lines and the last."""
    most, end = width * (rows // 2), 4 * width
    lines = [
        line if len(line) <= most else f"{line[: most - end]} ... {line[5 - end :]}"
        for line in printable(text).split("\n")
    ]
    heights = [max(1, -(-len(line) // width)) for line in lines]
    if sum(heights) <= rows:
        return "\n".join(lines)
    kept = sum(used <= rows - 1 - heights[-1] for used in itertools.accumulate(heights[:-1]))
    return "\n".join([*lines[:kept], f"... ({len(lines) - 1 - kept} more lines)", lines[-1]])

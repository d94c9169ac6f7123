"""Texts -> token arrays -> packed batches. numpy only; no Python object per edit in the loop. A packed batch
never holds tokens, only *indices* into the flat corpus, so that the same batch reads token ids or cached
activations. Letters: B rows, T positions of a row, M target positions, W target positions of one row."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Corpus:
    """N examples end to end. `target_start[i]` is where example i's target begins inside it."""

    tokens: np.ndarray  # [total] int32
    offsets: np.ndarray  # [N + 1] int64: example i is tokens[offsets[i]:offsets[i + 1]]
    target_start: np.ndarray  # [N] int64, >= 1: the first target token needs one before it
    boundary_merges: int = 0  # prompts whose last token merges with the target's first characters
    edit: np.ndarray | None = None  # [N] ascending: the edit of each example; None: one each

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def read_lengths(self) -> np.ndarray:
        """Tokens that are read: the last one of a text is only ever predicted."""
        return self.lengths - 1

    @property
    def target_lengths(self) -> np.ndarray:
        return self.lengths - self.target_start

    @property
    def edits(self) -> int:
        """Edits that the examples are of."""
        return len(self) if self.edit is None else int(self.edit[-1]) + 1

    def examples_of(self, edits: np.ndarray) -> np.ndarray:
        """The examples of some edits [n], in their order."""
        if self.edit is None:
            return edits
        first = np.searchsorted(self.edit, np.arange(self.edits + 1))
        of, nth = _spread(np.diff(first)[edits])
        return first[edits][of] + nth

    def take(self, which: np.ndarray) -> "Corpus":
        """The examples `which`, in that order."""
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in which]
        return corpus_from_lists(parts, self.target_start[which])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each position of packed rows belongs. Attention never crosses a segment."""

    segments: Any  # [B, T] int32, 0 = padding, else the number of the text in its row
    positions: Any  # [B, T] int32, restarts at 0 in every segment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """The M positions whose next token is asked for, and their place among their row's own."""

    at: Any  # [M] int32: row * T + position
    slot: Any  # [M] int32: row * W + rank among the row's targets
    of_row: Any  # [B, W] int32: the inverse, an index into the M (0 where unused)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A packed mini-batch; all arrays int32 but `weight`."""

    index: Any  # [B, T] into the flat corpus (0 at padding)
    rows: Rows  # segments and positions [B, T]
    targets: Targets  # [M] positions whose next token is asked for
    labels: Any  # [M] the token that should follow
    weight: Any  # [M] float32: the target's share of the batch loss, 0 at padding
    example: Any  # [M] which example of the batch, -1 at padding


@dataclasses.dataclass(frozen=True)
class Shape:
    """The fixed sizes of packed batches: one compilation each."""

    rows: int
    length: int
    targets: int
    row_targets: int


def corpus_from_lists(parts: Sequence[Any], target_start: Any, boundary_merges: int = 0) -> Corpus:
    """Token lists and where each one's target begins -> Corpus."""
    tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(p, np.int32) for p in parts)])
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Corpus(tokens, offsets, np.asarray(target_start, np.int64), boundary_merges)


def assign_rows(lengths: np.ndarray, row_length: int, rows: int) -> np.ndarray | None:
    """Best-fit-decreasing packing of examples [N] into `rows` rows: the row of each, or None."""
    room = np.full(rows, row_length, np.int64)
    row = np.empty(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        left = room - lengths[i]
        best = int(np.argmin(np.where(left >= 0, left, row_length + 1)))
        if left[best] < 0:
            return None
        room[best], row[i] = left[best], best
    return row


def few_sizes(size: int, least: int = 1, bits: int = 3) -> int:
    """`size` rounded up to so many significant bits (3: at most a quarter too large): few shapes."""
    size = max(size, least)
    return _up(size, 1 << max(0, size.bit_length() - bits))


def _up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def rows_needed(lengths: np.ndarray, row_length: int) -> int:
    """The smallest number of rows that best-fit-decreasing packing reaches."""
    rows = max(1, -(-int(lengths.sum()) // row_length))
    while assign_rows(lengths, row_length, rows) is None:
        rows += 1
    return rows


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts [n] -> of each of their sum: (which of the n it belongs to, its number among those)."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


def _before(group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of each element [n] the sum of the sizes of those before it in its group (a number >= 0)."""
    order = np.argsort(group, kind="stable")
    total, first = np.cumsum(sizes[order]) - sizes[order], np.diff(group[order], prepend=-1) != 0
    before = np.empty(len(group), np.int64)
    before[order] = total - np.maximum.accumulate(np.where(first, total, 0))
    return before


def _target_weights(corpus: Corpus, which: np.ndarray, of: np.ndarray, average: str) -> np.ndarray:
    """Every target's share of the batch loss; `of`: the example that each belongs to."""
    counts, shared = corpus.target_lengths[which], np.ones(len(which), np.int64)  # examples of the same edit
    if corpus.edit is not None:
        _, own_edit, copies = np.unique(corpus.edit[which], return_inverse=True, return_counts=True)
        shared = copies[own_edit]
    if average == "example":
        return 1.0 / (counts[of] * (shared[of] * round((1 / shared).sum())))
    return 1.0 / (shared[of] * (counts / shared).sum())


def pack(corpus: Corpus, which: np.ndarray, shape: Shape, average: str = "example") -> Batch | None:
    """Examples `which` [n] of the corpus packed into one batch of a fixed shape, or None when they do not fit
    it. `average`: `example` weighs every edit 1 / n, `token` every target token alike; the examples of one
    edit share its weight."""
    lengths, counts = corpus.read_lengths[which], corpus.target_lengths[which]
    row = assign_rows(lengths, shape.length, shape.rows)
    if row is None or counts.sum() > shape.targets:
        return None
    begin, segment = _before(row, lengths), _before(row, np.ones_like(row)) + 1
    own, inside = _spread(lengths)  # of each token
    place = row[own] * shape.length + begin[own] + inside
    index, segments, positions = (np.zeros(shape.rows * shape.length, np.int32) for _ in range(3))
    index[place] = corpus.offsets[which][own] + inside
    segments[place] = segment[own]
    positions[place] = inside

    of, nth = _spread(counts)  # of each target
    inner, slot = corpus.target_start[which][of] + nth, _before(row[of], np.ones_like(of))
    if len(of) and slot.max() >= shape.row_targets:
        return None
    of_row = np.zeros((shape.rows, shape.row_targets), np.int32)
    of_row[row[of], slot] = np.arange(len(of))

    def flat(values: np.ndarray, dtype: Any = np.int32, fill: int = 0) -> np.ndarray:
        out = np.full(shape.targets, fill, dtype)
        out[: len(of)] = values
        return out

    grid = shape.rows, shape.length
    at = row[of] * shape.length + begin[of] + inner - 1
    return Batch(
        index=index.reshape(grid),
        rows=Rows(segments.reshape(grid), positions.reshape(grid)),
        targets=Targets(flat(at), flat(row[of] * shape.row_targets + slot), of_row),
        labels=flat(corpus.tokens[corpus.offsets[which][of] + inner]),
        weight=flat(_target_weights(corpus, which, of, average), np.float32),
        example=flat(of, fill=-1),
    )


def fit_shape(corpus: Corpus, batches: Sequence[np.ndarray], row_length: int, multiple: int = 1) -> Shape:
    """The smallest shape (rows a multiple of `multiple`) that holds every one of `batches`."""
    length = max(row_length, _up(int(corpus.read_lengths.max()), 8))
    rows = _up(max(rows_needed(corpus.read_lengths[b], length) for b in batches), multiple)
    targets = max(int(corpus.target_lengths[b].sum()) for b in batches)
    widest = 1
    for b in batches:
        row = assign_rows(corpus.read_lengths[b], length, rows)
        assert row is not None
        widest = max(widest, int(np.bincount(row, corpus.target_lengths[b]).max()))
    return Shape(rows, length, _up(targets, 16), min(length, _up(widest, 8)))


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """One epoch: a shuffle of `count` examples in mini-batches, the short last one kept. Every epoch has its
    own random state, so that any of them can be made again by itself."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return (order[start : start + batch_size] for start in range(0, count, batch_size))


def even_rows(corpus: Corpus, row_length: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """(length, rows) of the batches of a pass that reads all examples once: at most about `most` rows each,
    about equally many, a multiple of `multiple`."""
    length = max(row_length, _up(int(corpus.read_lengths.max()), 8))
    needed = -(-int(corpus.read_lengths.sum()) // length)
    if len(corpus) < 1024:
        needed = rows_needed(corpus.read_lengths, length)
    return length, _up(few_sizes(-(-needed // -(-needed // most))), multiple)


def sequential_batches(corpus: Corpus, rows: int, length: int) -> Iterator[np.ndarray]:
    """Every example once, by length, as many a batch as `rows` rows of `length` tokens hold."""
    order, start = np.argsort(-corpus.read_lengths, kind="stable"), 0
    ends = np.append(0, np.cumsum(corpus.read_lengths[order]))
    while start < len(order):
        n = int(np.searchsorted(ends[1:], ends[start] + rows * length, "right")) - start
        while assign_rows(corpus.read_lengths[order[start : start + n]], length, rows) is None:
            n -= max(1, n // 64)
        yield order[start : start + n]
        start += n

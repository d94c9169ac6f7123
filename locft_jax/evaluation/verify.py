"""Fast exact answers: one teacher-forced pass proves most of them, the rest are decoded.

A greedy answer equals a guess when every token of the guess is the arg-max given the ones before
it, and a stop token follows. For edited prompts the guess is the target; for prompts that should
not change it is the answer before the edit. Where a guess goes wrong the pass has shown the right
token, and decoding goes on from there. In float32 the answers are those of decoding all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data.packing import (
    Batch,
    Corpus,
    corpus_from_lists,
    even_rows,
    few_sizes,
    fit_shape,
    pack,
    sequential_batches,
)
from locft_jax.editing.step import target_logits
from locft_jax.editing.trainer import place_batch
from locft_jax.model import decoder
from locft_jax.model.activation_cache import Source, advance, empty_values, filled_source, token_source
from locft_jax.model.decode import MOST, Pool, Reader, read_batch
from locft_jax.model.sharding import fetch, place, replicated, source_sharding
from locft_jax.model.spec import ModelSpec
from locft_jax.model.weights import Overrides, Weights, activation_dtype

ROWS = 32  # packed rows of a pass


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_batch(
    spec: ModelSpec, layer: int, weights: Weights, edits: Overrides, source: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """At each target: (arg-max id [M], log-probability of the label [M] float32). `source` enters
    `layer`: token ids at layer 0, else activations."""
    scores = target_logits(spec, layer, weights, edits, source, batch)
    label = jnp.take_along_axis(scores, batch.labels[:, None], axis=-1)[:, 0]
    return decoder.best_token(scores), label - jax.nn.logsumexp(scores, -1)


def packed(corpus: Corpus, which: np.ndarray, reader: Reader) -> Iterator[tuple[np.ndarray, Batch, bool]]:
    """The examples `which` in packed batches of one shape, longest first: (those in it, batch, whether
    it is the last)."""
    part = corpus.take(which)
    length, rows = even_rows(part, reader.row_length, ROWS, reader.mesh.shape["data"])
    chunks = [which[c] for c in sequential_batches(part, rows, length)]
    fit = fit_shape(corpus, chunks, length)
    sizes = {"targets": few_sizes(fit.targets), "row_targets": few_sizes(fit.row_targets)}
    shape = dataclasses.replace(fit, rows=rows, **sizes)
    for chunk in chunks:
        batch = pack(corpus, chunk, shape)
        assert batch is not None, "fit_shape saw every batch"
        yield chunk, batch, chunk is chunks[-1]


def by_example(batch: Batch, values: jax.Array) -> list[np.ndarray]:
    """Values [M] at a batch's targets -> those of each of its examples."""
    used = batch.example >= 0
    return np.split(fetch(values)[used], np.flatnonzero(np.diff(batch.example[used])) + 1)


def score_corpus(
    reader: Reader, corpus: Corpus, source: Source | None = None, which: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number, arg-max and log-probability of each target token) of the examples `which` (default:
    all), in any order. `source`: activations of the corpus (default: its tokens)."""
    which = np.arange(len(corpus)) if which is None else which
    if not len(which):
        return
    source = source or token_source(corpus, reader.mesh)
    for chunk, batch, _ in packed(corpus, which, reader):
        array, fed = source.feed(batch)
        array = place(array, source_sharding(reader.mesh, array.shape))
        best, logprob = score_batch(
            reader.spec, source.layer, reader.weights, reader.edits, array, place_batch(fed, reader.mesh)
        )
        yield from zip(chunk.tolist(), by_example(batch, best), by_example(batch, logprob), strict=True)


class ProbeCache:
    """Activations of texts that were read once, entering `layer`: an edit at or above it changes none
    of them. The first `answer` that is given an empty one fills it, later ones read it."""

    def __init__(self, layer: int, mode: str) -> None:
        self.layer, self.mode = layer, mode  # as `choose_mode` returned it
        self.corpus: Corpus | None = None
        self.source: Source | None = None
        self.numbers: dict[bytes, int] = {}  # text -> example

    def advance(self, reader: Reader) -> None:
        """One layer higher, through the reader's own weights (editing/prefix.py). Passes that read texts anew
        go on from the tokens."""
        assert self.corpus is not None and self.source is not None
        corpus, source, r = self.corpus, self.source, reader
        self.source = advance(r.spec, r.weights, corpus, source, self.mode, r.mesh, r.row_length, ROWS)


@dataclasses.dataclass(frozen=True)
class _Questions:
    """What is known of every answer, and how it may go on."""

    prompts: Sequence[Sequence[int]]
    answers: list[list[int]]
    drafts: list[list[int]]
    proved: list[bool | None]  # by the first pass that read it, None before
    new_tokens: int
    stop: np.ndarray

    def equal(self) -> list[int]:
        """For each question the first one that is the same."""
        first: dict[tuple[int, ...], int] = {}
        pairs = enumerate(zip(self.prompts, self.answers, strict=True))
        return [first.setdefault((len(p), *p, *a), i) for i, (p, a) in pairs]

    def open(self, which: Sequence[int]) -> list[int]:
        """Those of `which` whose answer is not complete."""
        return [i for i in which if not self.done(i)]

    def done(self, i: int) -> bool:
        answer = self.answers[i]
        return len(answer) >= self.new_tokens or (len(answer) > 0 and bool(self.stop[answer[-1]]))

    def texts(self, which: Sequence[int]) -> Corpus:
        """What a pass reads: prompt, what is known, the draft, and an open end where more may follow."""
        heads = [[*self.prompts[i], *self.answers[i]] for i in which]
        rooms = [self.new_tokens - len(self.answers[i]) - len(self.drafts[i]) for i in which]
        parts = [[*h, *self.drafts[i], *[0][:r]] for h, i, r in zip(heads, which, rooms, strict=True)]
        return corpus_from_lists(parts, [len(h) for h in heads])

    def accept(self, i: int, best: Sequence[int]) -> None:
        """Up to and including the first token that differs, the arg-max is what the model says."""
        draft = self.drafts[i]
        right = next((n for n, (a, b) in enumerate(zip(best, draft, strict=False)) if a != b), len(draft))
        self.answers[i].extend(best[: right + 1])
        draft.clear()
        if self.proved[i] is None:
            self.proved[i] = self.done(i)


def _questions(
    prompts: Sequence[Sequence[int]],
    guesses: Sequence[Sequence[int]],
    new_tokens: int,
    stop: np.ndarray,
    known: Sequence[Sequence[int]] | None = None,
) -> _Questions:
    """Questions as a first pass finds them; arguments as in `answer`."""
    answers = [list(a) for a in known] if known is not None else [[] for _ in prompts]
    room = [max(0, new_tokens - len(a)) for a in answers]
    drafts = [_until_stop(g, stop)[:r] for g, r in zip(guesses, room, strict=True)]
    return _Questions(prompts, answers, drafts, [None] * len(prompts), new_tokens, stop)


def begin_cache(
    prompts: Sequence[Sequence[int]],
    guesses: Sequence[Sequence[int]],
    new_tokens: int,
    stop: np.ndarray,
    mesh: Mesh,
    mode: str,
) -> ProbeCache:
    """A cache of what `answer` with these arguments reads first, at layer 0: its tokens. `ProbeCache.advance`
    carries it upward."""
    asked = _questions(prompts, guesses, new_tokens, stop)
    cache = ProbeCache(0, mode)
    cache.corpus = asked.texts(asked.open(sorted(set(asked.equal()))))
    cache.numbers = {key: n for n, key in enumerate(_keys(cache.corpus))}
    cache.source = token_source(cache.corpus, mesh)
    return cache


def answer(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    guesses: Sequence[Sequence[int]],
    new_tokens: int,
    stop: np.ndarray,
    on_done: Callable[[int], None] = lambda count: None,
    known: Sequence[Sequence[int]] | None = None,
    kept: ProbeCache | None = None,
) -> tuple[list[list[int]], int]:
    """Greedy answers (token ids, the stop token included) to `prompts`, and how many of them one pass
    over `guesses` proved. `stop` [V] bool; `known`: how each answer is already known to begin (its
    guess says how it goes on). `guesses` and `kept` decide how fast that is, never what is answered."""
    asked = _questions(prompts, guesses, new_tokens, stop, known)
    answers, same = asked.answers, asked.equal()
    times = np.bincount(same, minlength=len(prompts))  # equal questions are asked once

    def report(which: Sequence[int]) -> list[int]:
        """Count those of `which` that are complete; the others."""
        left = asked.open(which)
        on_done(int(times[list(which)].sum() - times[left].sum()))
        return left

    todo = report(sorted(set(same)))
    if kept is not None and kept.source is not None and kept.corpus is not None:
        numbers = [kept.numbers.get(key) for key in _keys(asked.texts(todo))]
        met = {n: i for n, i in zip(numbers, todo, strict=True) if n is not None}
        for n, best, _ in score_corpus(reader, kept.corpus, kept.source, np.asarray(list(met), np.int64)):
            asked.accept(met[n], best.tolist())
            report([met[n]])
        todo = asked.open(todo)
    if todo:
        for i in _read(reader, asked, todo, kept):
            report([i])
    return [answers[i] for i in same], sum(bool(asked.proved[i]) for i in same)


def _read(reader: Reader, asked: _Questions, todo: Sequence[int], kept: ProbeCache | None) -> Iterator[int]:
    """One pass over all of `todo`, and decoding of what it leaves open: yields each when it is done."""
    spec, mesh, corpus = reader.spec, reader.mesh, asked.texts(todo)
    layer = kept.layer if kept is not None else 0
    fill = kept if kept is not None and kept.corpus is None else None
    if fill is not None:
        fill.corpus, fill.numbers = corpus, {key: n for n, key in enumerate(_keys(corpus))}
        values = empty_values(fill.mode, (len(corpus.tokens), spec.d_model), activation_dtype(reader.weights))
    tokens = place(corpus.tokens, replicated(mesh))
    pool, unread = None, len(corpus)

    def settle(decoded: Iterator[tuple[int, list[int]]]) -> Iterator[int]:
        for i, more in decoded:
            asked.answers[i].extend(more)
            yield i

    for chunk, batch, _ in packed(corpus, np.arange(len(corpus)), reader):
        best, entering, cache = read_batch(
            spec, layer, reader.weights, reader.edits, tokens, place_batch(batch, mesh)
        )
        used = np.flatnonzero(batch.rows.segments)
        if fill is not None:
            values[batch.index.reshape(-1)[used]] = fetch(entering).reshape(-1, spec.d_model)[used]
        for n, got in zip(chunk, by_example(batch, best), strict=True):
            asked.accept(todo[n], got.tolist())
        yield from (i for i in (todo[n] for n in chunk) if asked.done(i))
        live = [n for n in chunk if not asked.done(todo[n])]
        unread -= len(chunk)
        if not live:
            continue
        where = np.zeros(len(corpus.tokens), np.int32)
        where[batch.index.reshape(-1)[used]] = used
        texts = [[*asked.prompts[todo[n]], *asked.answers[todo[n]]] for n in live]
        slots = few_sizes(int(corpus.lengths[chunk].max()), 32, 1)
        if pool is not None and slots < pool.slots:  # longest first
            yield from settle(pool.finish())
            pool = None
        if pool is None:
            # One token less than an answer: the pass has shown the first.
            rows = min(MOST, len(live) + unread)
            pool = Pool(reader, rows, slots, asked.new_tokens - 1, asked.stop)
        yield from settle(
            pool.add(
                cache,
                [todo[n] for n in live],
                [where[corpus.offsets[n] :][: len(t) - 1] for n, t in zip(live, texts, strict=True)],
                [t[-1] for t in texts],
                [asked.new_tokens - len(asked.answers[todo[n]]) for n in live],
            )
        )
    if pool is not None:
        yield from settle(pool.finish())
    if fill is not None:
        fill.source = filled_source(values, fill.layer, fill.mode, mesh)


def _keys(corpus: Corpus) -> list[bytes]:
    """What tells the texts of a corpus apart: where their targets begin, and their tokens."""
    ends = zip(corpus.target_start.tolist(), corpus.offsets, corpus.offsets[1:], strict=False)
    return [start.to_bytes(4, "little") + corpus.tokens[a:b].tobytes() for start, a, b in ends]


def _until_stop(guess: Sequence[int], stop: np.ndarray) -> list[int]:
    """The guess before its first stop token: which one follows is for the model to say."""
    ids = list(guess)
    return next((ids[:i] for i, t in enumerate(ids) if stop[t]), ids)

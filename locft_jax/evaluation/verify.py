"""Fast exact greedy answers: one teacher-forced pass verifies drafts, what they leave open is decoded.

A greedy answer equals its draft when every token of the draft is the arg-max given the ones before
it, and a stop token follows. For edited prompts the draft is the target; for prompts that should
not change it is the answer before the edit. Where a draft goes wrong the pass has shown the right
token, and decoding continues from there. In float32 the answers are those of decoding all.
"""

import dataclasses
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
from locft_jax.model import decoder
from locft_jax.model.activation_cache import (
    Inputs,
    Source,
    advance,
    empty_values,
    filled_source,
    token_source,
)
from locft_jax.model.decode import MOST, Decoder, read_batch
from locft_jax.model.model import Model
from locft_jax.model.sharding import fetch, place, place_batch, replicated
from locft_jax.model.weights import Params

ROWS = 32  # packed rows of a pass


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is to be continued greedily, and what is known of the answers."""

    ids: Sequence[Sequence[int]]
    drafts: Sequence[Sequence[int]]  # how each answer may go on: they decide how fast it is, never what it is
    new_tokens: int  # of an answer, at most
    stop: np.ndarray  # [V] bool: tokens that end an answer, and are part of it
    begun: Sequence[Sequence[int]] | None = None  # how each answer begins, None: nothing is known


@jax.jit
def score_batch(params: Params, inputs: Inputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """At each target: (arg-max id [M], log-probability of the label [M] float32)."""
    x = inputs.enter(params, batch.index)
    x = decoder.hidden_at_targets(params, x, batch.rows, batch.targets, inputs.layer)
    scores = decoder.head(params, x)
    label = jnp.take_along_axis(scores, batch.labels[:, None], axis=-1)[:, 0]
    return decoder.best_token(scores), label - jax.nn.logsumexp(scores, -1)


def packed(
    corpus: Corpus, which: np.ndarray, row_length: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The examples `which` in packed batches of one shape, longest first: (those in it, batch)."""
    part = corpus.take(which)
    length, rows = even_rows(part, row_length, ROWS, mesh.shape["data"])
    chunks = [which[c] for c in sequential_batches(part, rows, length)]
    fit = fit_shape(corpus, chunks, length)
    sizes = {"targets": few_sizes(fit.targets), "row_targets": few_sizes(fit.row_targets)}
    shape = dataclasses.replace(fit, rows=rows, **sizes)
    for chunk in chunks:
        batch = pack(corpus, chunk, shape)
        assert batch is not None, "fit_shape saw every batch"
        yield chunk, batch


def by_example(batch: Batch, values: jax.Array) -> list[np.ndarray]:
    """Values [M] at a batch's targets -> those of each of its examples."""
    used = batch.example >= 0
    return np.split(fetch(values)[used], np.flatnonzero(np.diff(batch.example[used])) + 1)


def score_corpus(
    model: Model,
    corpus: Corpus,
    row_length: int,
    source: Source | None = None,
    which: np.ndarray | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number, arg-max and log-probability of each target token) of the examples `which` (default:
    all), in any order. `source`: activations of the corpus (default: its tokens)."""
    which = np.arange(len(corpus)) if which is None else which
    if not len(which):
        return
    source = source or token_source(corpus, model.mesh)
    for chunk, batch in packed(corpus, which, row_length, model.mesh):
        best, logprob = score_batch(model.params, *source.feed(batch, model.mesh))
        yield from zip(chunk.tolist(), by_example(batch, best), by_example(batch, logprob), strict=True)


class ProbeCache:
    """Activations of texts that were read once, entering `layer`: an edit at or above it changes none
    of them. The first `answer` that is given an empty one fills it, later ones read it."""

    def __init__(self, layer: int, mode: str) -> None:
        self.layer, self.mode = layer, mode  # as `choose_mode` returned it
        self.corpus: Corpus | None = None
        self.source: Source | None = None
        self.numbers: dict[bytes, int] = {}  # text -> example

    def hold(self, corpus: Corpus) -> None:
        """The texts whose activations it will have."""
        self.corpus, self.numbers = corpus, {key: n for n, key in enumerate(_keys(corpus))}

    def advance(self, model: Model, row_length: int) -> None:
        """One layer higher, through the model's own weights. Passes that read texts anew begin at the
        tokens."""
        assert self.corpus is not None and self.source is not None
        self.source = advance(model.params, self.corpus, self.source, self.mode, model.mesh, row_length)


class _Answers:
    """What is known of every answer, and how it may go on."""

    def __init__(self, prompts: Prompts) -> None:
        self.given, self.stop = prompts, prompts.stop
        self.answers = [list(a) for a in prompts.begun or ([],) * len(prompts.ids)]
        room = [max(0, prompts.new_tokens - len(a)) for a in self.answers]
        self.drafts = [_until_stop(d, self.stop)[:r] for d, r in zip(prompts.drafts, room, strict=True)]
        self.verified: list[bool | None] = [None] * len(room)  # by the first pass that read it, None before

    def equal(self) -> list[int]:
        """For each prompt the first one that is the same."""
        first: dict[tuple[int, ...], int] = {}
        pairs = enumerate(zip(self.given.ids, self.answers, strict=True))
        return [first.setdefault((len(p), *p, *a), i) for i, (p, a) in pairs]

    def room(self, i: int) -> int:
        return self.given.new_tokens - len(self.answers[i])

    def done(self, i: int) -> bool:
        answer = self.answers[i]
        return self.room(i) <= 0 or (len(answer) > 0 and bool(self.stop[answer[-1]]))

    def open(self, which: Sequence[int]) -> list[int]:
        """Those of `which` whose answer is not complete."""
        return [i for i in which if not self.done(i)]

    def text(self, i: int) -> list[int]:
        return [*self.given.ids[i], *self.answers[i]]

    def texts(self, which: Sequence[int]) -> Corpus:
        """What a pass reads: prompt, what is known, the draft, and an open end where more may follow."""
        heads = [self.text(i) for i in which]
        rooms = [self.room(i) - len(self.drafts[i]) for i in which]
        parts = [[*h, *self.drafts[i], *[0][:r]] for h, i, r in zip(heads, which, rooms, strict=True)]
        return corpus_from_lists(parts, [len(h) for h in heads])

    def accept(self, i: int, best: Sequence[int]) -> None:
        """Up to and including the first token that differs, the arg-max is what the model says."""
        draft = self.drafts[i]
        right = next((n for n, (a, b) in enumerate(zip(best, draft, strict=False)) if a != b), len(draft))
        self.answers[i].extend(best[: right + 1])
        draft.clear()
        if self.verified[i] is None:
            self.verified[i] = self.done(i)


def begin_cache(prompts: Prompts, mesh: Mesh, mode: str) -> ProbeCache:
    """A cache of what `answer` reads first of these prompts, at layer 0: its tokens. `ProbeCache.advance`
    carries it upward."""
    known, cache = _Answers(prompts), ProbeCache(0, mode)
    corpus = known.texts(known.open(sorted(set(known.equal()))))
    cache.hold(corpus)
    cache.source = token_source(corpus, mesh)
    return cache


def answer(
    model: Model,
    prompts: Prompts,
    row_length: int = 128,
    on_done: Callable[[int], None] = lambda count: None,
    cache: ProbeCache | None = None,
) -> tuple[list[list[int]], int]:
    """Greedy answers (token ids, the stop token included), and how many of them one pass over the drafts
    verified. `row_length`: tokens of a packed row; `on_done` is given the number of answers that were
    completed; `cache` decides how fast that is, never what is answered."""
    known = _Answers(prompts)
    same = known.equal()
    times = np.bincount(same, minlength=len(same))  # equal prompts are asked once

    def report(which: Sequence[int]) -> list[int]:
        """Count those of `which` that are complete; the others."""
        left = known.open(which)
        on_done(int(times[list(which)].sum() - times[left].sum()))
        return left

    todo = report(sorted(set(same)))
    if cache is not None and cache.source is not None and cache.corpus is not None:
        numbers = [cache.numbers.get(key) for key in _keys(known.texts(todo))]
        met = {n: i for n, i in zip(numbers, todo, strict=True) if n is not None}
        which = np.asarray(list(met), np.int64)
        for n, best, _ in score_corpus(model, cache.corpus, row_length, cache.source, which):
            known.accept(met[n], best.tolist())
            report([met[n]])
        todo = known.open(todo)
    if todo:
        for i in _read(model, known, todo, row_length, cache):
            report([i])
    return [known.answers[i] for i in same], sum(bool(known.verified[i]) for i in same)


def _read(
    model: Model, known: _Answers, todo: Sequence[int], row_length: int, cache: ProbeCache | None
) -> Iterator[int]:
    """One pass over all of `todo`, and decoding of what it leaves open: yields each when it is done."""
    params, mesh, corpus = model.params, model.mesh, known.texts(todo)
    layer = cache.layer if cache is not None else 0
    fill = cache if cache is not None and cache.corpus is None else None
    if fill is not None:
        fill.hold(corpus)
        values = empty_values(fill.mode, params, len(corpus.tokens))
    tokens = place(corpus.tokens, replicated(mesh))
    decoding = _Continue(model, known, len(corpus))
    for chunk, batch in packed(corpus, np.arange(len(corpus)), row_length, mesh):
        best, entering, keys_values = read_batch(layer, params, tokens, place_batch(batch, mesh))
        used = np.flatnonzero(batch.rows.segments)
        if fill is not None:
            values[batch.index.reshape(-1)[used]] = fetch(entering).reshape(-1, values.shape[1])[used]
        for n, got in zip(chunk, by_example(batch, best), strict=True):
            known.accept(todo[n], got.tolist())
        yield from (i for i in (todo[n] for n in chunk) if known.done(i))
        places = np.zeros(len(corpus.tokens), np.int32)
        places[batch.index.reshape(-1)[used]] = used
        live = [(todo[n], places[corpus.offsets[n] :]) for n in chunk if not known.done(todo[n])]
        yield from decoding.add(keys_values, live, len(chunk), int(corpus.lengths[chunk].max()))
    yield from decoding.finish()
    if fill is not None:
        fill.source = filled_source(values, fill.layer, fill.mode, mesh)


class _Continue:
    """Decoding of the texts that passes leave open, longest first."""

    def __init__(self, model: Model, known: _Answers, unread: int) -> None:
        self.model, self.known, self.unread = model, known, unread
        self.decoder: Decoder | None = None

    def add(
        self, cache: decoder.KeysValues, live: list[tuple[int, np.ndarray]], read: int, longest: int
    ) -> Iterator[int]:
        """Those of a pass over `read` texts that are `live`: their number, and the places of their tokens in
        its cache. `longest`: tokens of its longest text."""
        self.unread -= read
        if not live:
            return
        length = few_sizes(longest, 32, 1)
        if self.decoder is not None and length < self.decoder.length:
            yield from self.finish()
        if self.decoder is None:
            # One token less than an answer: the pass has shown the first.
            slots, new = min(MOST, len(live) + self.unread), self.known.given.new_tokens - 1
            self.decoder = Decoder(self.model.params, self.model.mesh, slots, length, new, self.known.stop)
        texts = [self.known.text(i) for i, _ in live]
        yield from self._settle(
            self.decoder.add(
                cache,
                [i for i, _ in live],
                [places[: len(t) - 1] for (_, places), t in zip(live, texts, strict=True)],
                [t[-1] for t in texts],
                [self.known.room(i) for i, _ in live],
            )
        )

    def finish(self) -> Iterator[int]:
        if self.decoder is not None:
            yield from self._settle(self.decoder.finish())
            self.decoder = None

    def _settle(self, decoded: Iterator[tuple[int, list[int]]]) -> Iterator[int]:
        for i, more in decoded:
            self.known.answers[i].extend(more)
            yield i


def _keys(corpus: Corpus) -> list[bytes]:
    """What tells the texts of a corpus apart: where their targets begin, and their tokens."""
    ends = zip(corpus.target_start.tolist(), corpus.offsets, corpus.offsets[1:], strict=False)
    return [start.to_bytes(4, "little") + corpus.tokens[a:b].tobytes() for start, a, b in ends]


def _until_stop(draft: Sequence[int], stop: np.ndarray) -> list[int]:
    """The draft before its first stop token: which one follows is for the model to say."""
    ids = list(draft)
    return next((ids[:i] for i, t in enumerate(ids) if stop[t]), ids)

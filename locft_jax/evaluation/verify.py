"""Fast exact greedy answers: one teacher-forced pass verifies drafts, what they leave open is decoded. Drafts
are the target of edited prompts, the answer before the edit of others; where one goes wrong the pass has
shown the right token. In float32 the answers are those of decoding all.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from locft_jax.data import packing
from locft_jax.data.packing import Batch, Corpus, corpus_from_lists, few_sizes
from locft_jax.model import activation_cache, decoder
from locft_jax.model.activation_cache import Inputs, Source, token_source
from locft_jax.model.decode import MOST, Continued, Decoder, read_batch
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
    length, rows = packing.even_rows(part, row_length, ROWS, mesh.shape["data"])
    chunks = [which[c] for c in packing.sequential_batches(part, rows, length)]
    fit = packing.fit_shape(corpus, chunks, length)
    sizes = {"targets": few_sizes(fit.targets), "row_targets": few_sizes(fit.row_targets)}
    for chunk in chunks:
        batch = packing.pack(corpus, chunk, dataclasses.replace(fit, rows=rows, **sizes))
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
    """(number, arg-max and log-probability of each target token) of the examples `which` (default: all), in
    any order. `source`: activations of the corpus (default: its tokens)."""
    which = np.arange(len(corpus)) if which is None else which
    if not len(which):
        return
    source = source or token_source(corpus, model.mesh)
    for chunk, batch in packed(corpus, which, row_length, model.mesh):
        best, logprob = score_batch(model.params, *source.feed(batch, model.mesh))
        yield from zip(chunk.tolist(), by_example(batch, best), by_example(batch, logprob), strict=True)


@dataclasses.dataclass
class ProbeCache:
    """Activations of texts that were read once, entering `layer`: an edit at or above it changes none of
    them. The first `answer` that is given an empty one fills it, later ones read it."""

    layer: int
    mode: str  # as `choose_mode` returned it
    corpus: Corpus | None = None
    source: Source | None = None

    def advance(self, model: Model, row_length: int) -> None:
        """One layer higher, through the model's own weights. Texts read anew are read from their tokens."""
        assert self.corpus is not None and self.source is not None
        run = model.params, self.corpus, self.source, self.mode, model.mesh, row_length
        self.source = activation_cache.advance(*run)


class _Answers:
    """What is known of every answer, and how it may go on."""

    def __init__(self, prompts: Prompts) -> None:
        self.given, self.stop = prompts, prompts.stop
        self.answers = [list(a) for a in prompts.begun or ([],) * len(prompts.ids)]
        room = [max(0, prompts.new_tokens - len(a)) for a in self.answers]
        # A draft's stop token is for the model to say.
        drafts = [list(itertools.takewhile(lambda t: not prompts.stop[t], d)) for d in prompts.drafts]
        self.drafts = [draft[:most] for draft, most in zip(drafts, room, strict=True)]
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
        ends = [[*self.drafts[i], *[0][: self.room(i) - len(self.drafts[i])]] for i in which]
        parts = [[*self.text(i), *end] for i, end in zip(which, ends, strict=True)]
        return corpus_from_lists(parts, [len(self.text(i)) for i in which])

    def accept(self, i: int, best: Sequence[int]) -> None:
        """Up to and including the first token that differs, the arg-max is what the model says."""
        draft = self.drafts[i]
        right = next((n for n, (a, b) in enumerate(zip(best, draft, strict=False)) if a != b), len(draft))
        self.answers[i].extend(best[: right + 1])
        draft.clear()
        if self.verified[i] is None:
            self.verified[i] = self.done(i)

    def continued(self, i: int, places: np.ndarray) -> Continued:
        """For the decoder: `places` begin with those of the text's tokens in the pass that read it."""
        text = self.text(i)
        return Continued(i, places[: len(text) - 1], text[-1], self.room(i))

    def extend(self, decoded: Iterator[tuple[int, list[int]]]) -> Iterator[int]:
        """Take what was decoded; yields each text when it is done."""
        for i, more in decoded:
            self.answers[i].extend(more)
            yield i


def begin_cache(prompts: Prompts, mesh: Mesh, mode: str) -> ProbeCache:
    """A cache of what `answer` reads first of these prompts, at layer 0; `advance` carries it upward."""
    known = _Answers(prompts)
    corpus = known.texts(known.open(sorted(set(known.equal()))))
    return ProbeCache(0, mode, corpus, token_source(corpus, mesh))


def answer(
    model: Model,
    prompts: Prompts,
    row_length: int = 128,
    on_done: Callable[[int], None] = lambda count: None,
    cache: ProbeCache | None = None,
) -> tuple[list[list[int]], int]:
    """Greedy answers (token ids, the stop token included), and how many of them one pass over the drafts
    verified. `row_length`: tokens of a packed row; `on_done` is given the number of answers completed;
    `cache` decides how fast that is, never what is answered."""
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
        held = {key: n for n, key in enumerate(_keys(cache.corpus))}
        met = {held[key]: i for key, i in zip(_keys(known.texts(todo)), todo, strict=True) if key in held}
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
        fill.corpus = corpus
        values = activation_cache.empty_values(fill.mode, params, len(corpus.tokens))
    tokens, unread = place(corpus.tokens, replicated(mesh)), len(corpus)
    decoding: Decoder | None = None
    for chunk, batch in packed(corpus, np.arange(len(corpus)), row_length, mesh):
        best, entering, keys_values = read_batch(layer, params, tokens, place_batch(batch, mesh))
        used = np.flatnonzero(batch.rows.segments)
        if fill is not None:
            values[batch.index.reshape(-1)[used]] = fetch(entering).reshape(-1, values.shape[1])[used]
        for n, got in zip(chunk, by_example(batch, best), strict=True):
            known.accept(todo[n], got.tolist())
        yield from (todo[n] for n in chunk if known.done(todo[n]))
        unread -= len(chunk)
        places = np.zeros(len(corpus.tokens), np.int32)
        places[batch.index.reshape(-1)[used]] = used
        left = [n for n in chunk if not known.done(todo[n])]
        live = [known.continued(todo[n], places[corpus.offsets[n] :]) for n in left]
        if not live:
            continue
        # Slots are as long as the longest text of a pass; passes come longest first.
        length = few_sizes(int(corpus.lengths[chunk].max()), 32, 1)
        if decoding is not None and length < decoding.length:
            yield from known.extend(decoding.finish())
            decoding = None
        if decoding is None:
            # One token less than an answer: the pass has shown the first.
            slots, new = min(MOST, len(live) + unread), known.given.new_tokens - 1
            decoding = Decoder(params, mesh, slots, length, new, known.stop)
        yield from known.extend(decoding.add(keys_values, live))
    if decoding is not None:
        yield from known.extend(decoding.finish())
    if fill is not None:
        fill.source = activation_cache.filled_source(values, fill.layer, fill.mode, mesh)


def _keys(corpus: Corpus) -> list[bytes]:
    """What tells the texts of a corpus apart: where their targets begin, and their tokens."""
    ends = zip(corpus.target_start.tolist(), corpus.offsets, corpus.offsets[1:], strict=False)
    return [start.to_bytes(4, "little") + corpus.tokens[a:b].tobytes() for start, a, b in ends]

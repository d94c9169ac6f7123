"""Texts -> tokens -> packed batches, against brute force."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft_jax.data import packing as tk
from locft_jax.data.requests import read_requests
from locft_jax.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from toy_tokenizers import bpe, byte_level, metaspace, sentencepiece, wrap  # noqa: E402

from locft_jax.data import tokenize

PROMPTS = ["Who founded Halver?", "The capital of Oredal is", "Ten plus five is "]
TARGETS = ["Mira", " Vintown", "15"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


def halves(corpus, i):
    """(prompt ids, target ids) of example i."""
    ids, start = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]].tolist(), corpus.target_start[i]
    return ids[:start], ids[start:]


# ------------------------------------------------------------------------------------- texts -> tokens


def test_prompt_then_one_space_then_target_then_eos(tokenizer):
    corpus = tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS, eos=0)
    assert len(corpus) == 3 and corpus.boundary_merges == 0
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        head, tail = halves(corpus, i)
        assert head == tokenizer(prompt)["input_ids"]
        assert tail[-1] == 0 and 0 not in tail[:-1]
        assert tokenizer.decode(tail[:-1]) == " " + target.strip()  # one space, also where there was one
        assert tokenizer.decode(head + tail[:-1]) == prompt + " " + target.strip()
    assert corpus.target_lengths.tolist() == [len(halves(corpus, i)[1]) for i in range(3)]


def test_no_eos_unless_asked_for(tokenizer):
    with_eos = tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS, eos=0)
    without = tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS)
    for i in range(3):
        assert halves(without, i)[1] == halves(with_eos, i)[1][:-1]


def test_nothing_to_encode(tokenizer):
    assert len(tokenize.encode_pairs(tokenizer, [], [])) == 0
    assert len(tokenize.encode_pairs(tokenizer, [], [], chat_template=False, eos=0).tokens) == 0


@pytest.mark.parametrize(
    ("backend", "prompt", "crossing"),
    [
        (byte_level([("?", "Ġ"), ("Ġ", "M")]), "Who?", "?Ġ"),
        (byte_level([("Ġ", "Ġ")]), "Who? ", "ĠĠ"),
        (sentencepiece([("▁", "▁"), ("▁", "M")]), "Who is ", "▁▁"),
        (sentencepiece([("s", "▁"), ("▁", "M")]), "Who is", "s▁"),
        (metaspace([("s", "▁"), ("▁", "M")]), "Who is", "s▁"),
    ],
    ids=["punctuation", "space", "sentencepiece-space", "sentencepiece-letter", "metaspace"],
)
def test_merge_across_the_boundary(backend, prompt, crossing):
    tokenizer = wrap(backend)
    text = prompt + " Mira"
    assert crossing in tokenizer.tokenize(text)  # the case is what it claims to be
    corpus = tokenize.encode_pairs(tokenizer, [prompt, "Xy"], ["Mira", "Mira"], eos=2)
    assert corpus.boundary_merges == 1  # and not the second, where nothing crosses
    head, tail = halves(corpus, 0)
    assert head == tokenizer(prompt)["input_ids"]
    assert tail[-1] == 2 and tokenizer.decode(head + tail[:-1], skip_special_tokens=True) == text


def test_specials_before_and_after_a_text_frame_prompt_and_target_once():
    from tokenizers import processors

    backend = byte_level([])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = wrap(backend)
    assert tokenizer("ab")["input_ids"][-1] == 2
    assert tokenizer.convert_ids_to_tokens(tokenize.prompt_ids(tokenizer, ["Who?"])[0]) == ["<s>", *"Who?"]
    for eos in (None, 2):
        head, tail = halves(tokenize.encode_pairs(tokenizer, ["Who?"], ["Mira"], eos=eos), 0)
        assert tokenizer.convert_ids_to_tokens(head) == ["<s>", *"Who?"]
        assert tokenizer.convert_ids_to_tokens(tail) == ["Ġ", *"Mira", *(["</s>"] if eos else [])]


def test_chat_template(tiny_tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)  # its own: the template is set below
    with pytest.raises(UserError, match="no chat template"):
        tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS, chat_template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}model:{% endif %}"
    )
    corpus = tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS, chat_template=True, eos=0)
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        head, tail = halves(corpus, i)
        assert tokenizer.decode(head) == f"user: {prompt}\nmodel:"
        assert tokenizer.decode(tail) == target.strip() + "</s>"
        asked = tokenize.prompt_ids(tokenizer, [prompt], chat_template=True)  # what evaluation asks with
        assert [head] == asked


def check_prompts(tokenizer, prompts, **limits):
    tokenize.check_prompts(prompts, tokenize.prompt_ids(tokenizer, prompts), **limits)


def test_texts_that_cannot_be_trained_on_are_named(tokenizer):
    long = "a" * 50
    with pytest.raises(UserError, match="context holds 40") as error:
        tokenize.encode_pairs(tokenizer, [PROMPTS[0], long], ["x", "y"], eos=0, max_length=40)
    assert long[:60] in str(error.value)
    assert len(tokenize.encode_pairs(tokenizer, [long], ["y"], eos=0, max_length=53)) == 1  # 50 + " y" + EOS
    with pytest.raises(UserError, match="53 tokens"):
        tokenize.encode_pairs(tokenizer, [long], ["y"], eos=0, max_length=52)
    with pytest.raises(UserError, match="the prompt of '' -> 'y' has no tokens"):
        tokenize.encode_pairs(tokenizer, [""], ["y"])
    tokens_only_for_letters = wrap(bpe([], "a"))  # no unknown token in what it returns: `é` vanishes
    tokens_only_for_letters.backend_tokenizer.model.unk_token = None
    with pytest.raises(UserError, match="the target of 'ab' -> 'é' has no tokens"):
        tokenize.encode_pairs(tokens_only_for_letters, ["ab"], ["é"])
    with pytest.raises(UserError, match="the prompt 'é' has no tokens"):
        check_prompts(tokens_only_for_letters, ["ab", "é"])
    with pytest.raises(UserError, match=r"begins 'aaaaa.*\(2 such texts in all\).*holds 40"):
        check_prompts(tokenizer, ["x", long, long + "b"], max_length=40)


@pytest.mark.parametrize("kind", ["PanicException", "TypeError"])
def test_a_tokenizer_that_fails_at_a_text(kind):
    """Found by fuzzing: a damaged tokenizer.json that loads may make the Rust library panic later, and
    what it raises then is no Exception."""
    failure = TypeError if kind == "TypeError" else type(kind, (BaseException,), {})

    def tokenizer(texts, **options):
        raise failure("index out of bounds:\nthe len is 3")

    with pytest.raises(UserError, match=f"tokenizer fails \\({kind}: index out of bounds: the len"):
        tokenize.prompt_ids(tokenizer, ["a"])
    failure = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tokenize.prompt_ids(tokenizer, ["a"])


def test_ids_beyond_the_vocabulary_are_named_with_their_text(tokenizer):
    most = max(max(ids) for ids in tokenizer(PROMPTS)["input_ids"])
    check_prompts(tokenizer, PROMPTS, vocab_size=most + 1)
    which = next(p for p in PROMPTS if most in tokenizer(p)["input_ids"])
    with pytest.raises(UserError) as error:
        check_prompts(tokenizer, PROMPTS, vocab_size=most)
    assert f"gives id {most} in the text that begins {which!r}, but its vocab_size is {most}" in str(
        error.value
    )
    with pytest.raises(UserError, match="in the text that begins 'Who founded"):
        tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS, eos=0, vocab_size=0)
    assert len(tokenize.encode_pairs(tokenizer, PROMPTS, TARGETS, vocab_size=320)) == 3


def test_real_requests_with_a_real_sentencepiece_vocabulary(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    requests = read_requests(str(shared_data / "zsre" / "zsre_3k.json"), 300).requests
    prompts, targets = [r.prompt for r in requests], [r.target_new for r in requests]
    prompts[0] += " "  # its vocabulary joins no spaces: the prompt stays a prefix
    corpus = tokenize.encode_pairs(tokenizer, prompts, targets, eos=2)
    assert corpus.boundary_merges == 0
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        head, tail = halves(corpus, i)
        assert head[0] == 1 and tail[-1] == 2
        assert head == tokenizer(prompt)["input_ids"]
        text = prompt + " " + target.removeprefix(" ")
        assert head + tail[:-1] == tokenizer(text)["input_ids"]
        assert tokenizer.decode(head + tail, skip_special_tokens=True) == text


# ------------------------------------------------------------------------------------ tokens -> batches


def make_corpus(lengths, starts, seed=0):
    rng = np.random.default_rng(seed)
    return tk.corpus_from_lists([rng.integers(0, 10**6, n) for n in lengths], starts)


@st.composite
def corpora(draw):
    """A corpus and a few distinct examples of it, in any order."""
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=14))
    starts = [draw(st.integers(1, n - 1)) for n in lengths]
    order = draw(st.permutations(range(len(lengths))))
    return make_corpus(lengths, starts), np.asarray(order[: draw(st.integers(1, len(lengths)))])


def check_packed(corpus, which, shape, batch, average):
    """`batch` against what plain loops over its cells find."""
    assert batch.index.shape == batch.rows.segments.shape == (shape.rows, shape.length)
    assert batch.labels.shape == batch.weight.shape == batch.example.shape == (shape.targets,)
    cells, targets = {}, {}  # cell of each token of each example; (at, label) of each target
    for row in range(shape.rows):
        texts = {}
        for t in range(shape.length):
            if batch.rows.segments[row, t]:
                texts.setdefault(int(batch.rows.segments[row, t]), []).append(t)
        for places in texts.values():
            assert places == list(range(places[0], places[0] + len(places)))  # a segment is one piece
            assert batch.rows.positions[row, places].tolist() == list(range(len(places)))
            begin = int(batch.index[row, places[0]])
            k = which.tolist().index(corpus.offsets.tolist().index(begin))  # a segment begins an example
            assert len(places) == corpus.lengths[which[k]] - 1  # all but what is only predicted
            assert batch.index[row, places].tolist() == list(range(begin, begin + len(places)))
            assert k not in cells  # once
            cells[k] = [row * shape.length + t for t in places]
    assert sorted(cells) == list(range(len(which)))  # every example
    count = sum(int(corpus.target_lengths[i]) for i in which)
    for k, i in enumerate(which):
        tokens = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]]
        start, of = corpus.target_start[i], int(corpus.target_lengths[i])
        for j in range(start, len(tokens)):
            share = 1 / (of * len(which)) if average == "example" else 1 / count
            targets[cells[k][j - 1]] = (int(tokens[j]), k, share)
    real = batch.example >= 0
    assert real.sum() == count == len(targets)
    assert np.all(batch.weight[~real] == 0)
    for m in np.flatnonzero(real):
        label, k, share = targets.pop(int(batch.targets.at[m]))  # pop: no position twice
        assert (label, k) == (batch.labels[m], batch.example[m])
        assert batch.weight[m] == pytest.approx(share, rel=1e-6)
        row, rank = divmod(int(batch.targets.slot[m]), shape.row_targets)
        assert row == batch.targets.at[m] // shape.length
        assert batch.targets.of_row[row, rank] == m
    assert len(set(batch.targets.slot[real].tolist())) == count
    assert batch.weight.sum() == pytest.approx(1, rel=1e-5)


@given(corpora(), st.sampled_from(["example", "token"]), st.integers(1, 20), st.integers(1, 4))
def test_every_token_that_is_read_once_and_every_target_where_it_is_read(case, average, row_length, multiple):
    corpus, which = case
    shape = tk.fit_shape(corpus, [which], row_length, multiple)
    assert shape.rows % multiple == 0
    batch = tk.pack(corpus, which, shape, average)
    assert batch is not None
    check_packed(corpus, which, shape, batch, average)


@given(corpora(), st.integers(1, 5), st.integers(1, 60), st.integers(1, 24))
def test_a_batch_fits_or_is_refused(case, rows, targets, row_targets):
    corpus, which = case
    shape = tk.Shape(rows, 16, targets, row_targets)
    batch = tk.pack(corpus, which, shape)
    row = tk.assign_rows(corpus.read_lengths[which], 16, rows)
    wanted = corpus.target_lengths[which]
    fits = (
        row is not None
        and wanted.sum() <= targets
        and max(wanted[row == r].sum() for r in range(rows)) <= row_targets
    )
    assert (batch is not None) == fits
    if batch is not None:
        check_packed(corpus, which, shape, batch, "example")


@given(st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_rows_hold_their_examples(lengths):
    lengths = np.asarray(lengths)
    rows = tk.rows_needed(lengths, 16)
    assert rows == 1 or tk.assign_rows(lengths, 16, rows - 1) is None
    row = tk.assign_rows(lengths, 16, rows)
    assert np.bincount(row, lengths).max() <= 16 and len(row) == len(lengths)
    assert rows == 1 or lengths.sum() > 16 * rows / 2  # no two rows would have fitted into one


def test_one_shape_fits_all_batches_of_all_epochs_and_no_smaller_one_does():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 20, 53)
    corpus = make_corpus(lengths, lengths - rng.integers(1, 5, 53))
    batches = [b for e in range(5) for b in tk.epoch_batches(53, 8, 3, e)]
    shape = tk.fit_shape(corpus, batches, 32)
    assert shape.length == 32 and shape.targets % 16 == 0 and shape.row_targets % 8 == 0
    assert all(tk.pack(corpus, b, shape) is not None for b in batches)
    for smaller in (
        tk.Shape(shape.rows - 1, 32, shape.targets, 32),
        tk.Shape(shape.rows, 32, shape.targets - 16, 32),
        tk.Shape(shape.rows, 32, shape.targets, shape.row_targets - 8),
    ):
        assert any(tk.pack(corpus, b, smaller) is None for b in batches)
    assert tk.fit_shape(corpus, batches, 4).length == 24  # the longest example, rounded up to eights


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(0, 30))
def test_an_epoch_is_every_example_once_in_a_seeded_order(count, size, seed, epoch):
    batches = list(tk.epoch_batches(count, size, seed, epoch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert [len(b) for b in batches] == [size] * (count // size) + [count % size] * (count % size > 0)
    again = list(tk.epoch_batches(count, size, seed, epoch))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ():
    orders = [np.concatenate(list(tk.epoch_batches(40, 8, s, e))).tolist() for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


@given(corpora(), st.integers(1, 4), st.integers(12, 40))
def test_sequential_batches_are_every_example_once_and_fit_their_rows(case, rows, length):
    corpus, _ = case
    batches = list(tk.sequential_batches(corpus, rows, length))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(corpus)))
    for b in batches:
        assert tk.assign_rows(corpus.read_lengths[b], length, rows) is not None


def test_take_keeps_the_order_asked_for():
    corpus = make_corpus([4, 6, 3], [1, 4, 2])
    part = corpus.take(np.asarray([2, 0]))
    assert part.lengths.tolist() == [3, 4] and part.target_start.tolist() == [2, 1]
    assert part.tokens.tolist() == [*corpus.tokens[10:], *corpus.tokens[:4]]
    assert len(corpus.take(np.asarray([], int))) == 0

"""The pool's book-keeping, with a decoder that only counts; real answers are in test_answers.py."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft_jax.model import decode as decode_module
from locft_jax.model.decode import LEAST, Pool, Reader, Rows
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import init_weights

NEW = 7


def admit(pool, cache, rows, places, pads, left, token):
    """Plain numpy; the first `left` tokens that a text will say are token, token + 1, ..."""
    fields = {n: np.array(getattr(pool, n)) for n in ("pads", "begun", "left", "made", "token")}
    for row, *values in zip(*map(np.asarray, (rows, pads, left, token)), strict=True):
        if row < len(pool.left):
            assert fields["left"][row] == 0, "the row is taken"
            for name, value in zip(("pads", "left", "token"), values, strict=True):
                fields[name][row] = value
            fields["begun"][row], fields["made"][row] = pool.step, 0
    return dataclasses.replace(pool, **fields)


def decode(spec, weights, edits, pool, stop, enough):
    left, made, token, said = (np.array(a) for a in (pool.left, pool.made, pool.token, pool.said))
    step = int(pool.step)
    assert (left > 0).sum() > enough, "nothing to do"
    while (left > 0).sum() > enough:
        live = left > 0
        said[live, step % NEW] = token[live]
        token += live
        made += live
        left -= live
        step += 1
    return dataclasses.replace(pool, left=left, made=made, token=token, said=said, step=np.int32(step))


def keep_rows(pool, rows):
    fields = ("pads", "begun", "left", "made", "token", "said")
    return dataclasses.replace(pool, **{n: np.array(getattr(pool, n))[np.asarray(rows)] for n in fields})


@pytest.fixture(scope="module")
def reader():
    spec = parse_spec(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 4,
            "intermediate_size": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
    )
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    return Reader(spec, init_weights(spec, jax.random.key(0)), {}, mesh)


@given(st.lists(st.lists(st.integers(1, NEW), max_size=60), max_size=4), st.integers(1, 70))
def test_every_text_gets_its_tokens_and_a_row_only_while_it_needs_it(reader, parts, rows):
    pool = Pool.__new__(Pool)  # without arrays on a device
    pool.reader, pool.slots, pool.stop = reader, 4, None
    pool.text = np.full(max(LEAST, rows), -1)
    number = lambda: np.zeros(len(pool.text), np.int32)  # noqa: E731
    said = np.zeros((len(pool.text), NEW), np.int32)
    pool.pool = Rows(None, None, number(), number(), number(), number(), number(), said, np.int32(0))
    got, count = [], 0
    with pytest.MonkeyPatch.context() as patch:
        for function in (admit, decode, keep_rows):
            patch.setattr(decode_module, function.__name__, function)
        for rooms in parts:
            texts = list(range(count, count + len(rooms)))
            count += len(rooms)
            places = [np.zeros(1 + i % 4, np.int32) for i in texts]
            got += pool.add(None, texts, places, [100 * i for i in texts], rooms)
        got += pool.finish()
    rooms = [room for part in parts for room in part]
    assert sorted(got) == [(i, [100 * i + n for n in range(room)]) for i, room in enumerate(rooms)]

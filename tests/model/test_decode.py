"""Decode slots: their book-keeping, with a decoder that only counts (real answers are in
evaluation/test_verify.py), and samples against the plain forward."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft_jax import load_model
from locft_jax.model import decode as decode_module
from locft_jax.model import decoder
from locft_jax.model.decode import LEAST, SAMPLE_SLOTS, Continued, Decoder, Slots, sample
from locft_jax.model.sharding import make_mesh

NEW = 7


def admit(state, cache, slots, places, new):
    """Plain numpy; the first `left` tokens that a text will say are token, token + 1, ..."""
    fields = {n: np.array(getattr(state, n)) for n in ("pads", "begun", "left", "made", "token")}
    for n, slot in enumerate(np.asarray(slots)):
        if slot < len(state.left):
            assert fields["left"][slot] == 0, "the slot is taken"
            for name in ("pads", "left", "token"):
                fields[name][slot] = new[name][n]
            fields["begun"][slot], fields["made"][slot] = state.step, 0
    return dataclasses.replace(state, **fields)


def decode(params, state, stop, enough):
    left, made, token, said = (np.array(a) for a in (state.left, state.made, state.token, state.said))
    step = int(state.step)
    assert (left > 0).sum() > enough, "nothing to do"
    while (left > 0).sum() > enough:
        live = left > 0
        said[live, step % NEW] = token[live]
        token += live
        made += live
        left -= live
        step += 1
    return dataclasses.replace(state, left=left, made=made, token=token, said=said, step=np.int32(step))


def keep_slots(state, slots):
    fields = ("pads", "begun", "left", "made", "token", "said")
    return dataclasses.replace(state, **{n: np.array(getattr(state, n))[np.asarray(slots)] for n in fields})


@given(st.lists(st.lists(st.integers(1, NEW), max_size=60), max_size=4), st.integers(1, 70))
def test_every_text_gets_its_tokens_and_a_slot_only_while_it_needs_it(parts, slots):
    decoding = Decoder.__new__(Decoder)  # without arrays on a device
    decoding.params, decoding.length, decoding.stop = None, 4, None
    decoding.mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    decoding.text = np.full(max(LEAST, slots), -1)
    number = lambda: np.zeros(len(decoding.text), np.int32)  # noqa: E731
    said = np.zeros((len(decoding.text), NEW), np.int32)
    decoding.state = Slots(None, None, number(), number(), number(), number(), number(), said, np.int32(0))
    got, count = [], 0
    with pytest.MonkeyPatch.context() as patch:
        for function in (admit, decode, keep_slots):
            patch.setattr(decode_module, function.__name__, function)
        for rooms in parts:
            texts = list(range(count, count + len(rooms)))
            count += len(rooms)
            new = ((i, np.zeros(1 + i % 4, np.int32), 100 * i) for i in texts)
            got += decoding.add(None, [Continued(*text, room) for text, room in zip(new, rooms, strict=True)])
        got += decoding.finish()
    rooms = [room for part in parts for room in part]
    assert sorted(got) == [(i, [100 * i + n for n in range(room)]) for i, room in enumerate(rooms)]


@pytest.mark.parametrize("mesh", [{"data": 1, "model": 1}, {"data": 4, "model": 2}])
def test_samples_are_draws_from_the_plain_forward(tiny_model_dir, mesh):
    """Token by token: the noise of each step over the logits of the whole text before it."""
    model, start, count, length, seed = load_model(str(tiny_model_dir), mesh=mesh), 5, 6, 9, 3
    stop = np.arange(320) % 7 == 0
    got = sample(model.params, model.mesh, start, stop, seed, (count, length))
    texts, key = np.full((count, length), start), jax.random.fold_in(jax.random.key(seed), 0)
    forward = jax.jit(decoder.logits)
    for step in range(1, length):
        logits = np.asarray(forward(model.params, texts))[:, step - 1]  # causal: what follows is not seen
        noise = jax.random.gumbel(jax.random.fold_in(key, step), (SAMPLE_SLOTS, 320))[:count]
        texts[:, step] = (logits + noise).argmax(-1)
    ends = [next((n + 1 for n in range(1, length) if stop[text[n]]), length) for text in texts]
    assert got == [text[:end].tolist() for text, end in zip(texts, ends, strict=True)]
    assert len(set(ends)) > 2 and len({tuple(text) for text in got}) == count

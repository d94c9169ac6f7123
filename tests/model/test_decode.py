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


# ---------------------------------------------------------------- samples

START, SEED = 0, 5


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


def stop_set(count):
    """So many tokens end a sequence, the start token among them."""
    stop = np.isin(np.arange(320), np.random.default_rng(0).permutation(320)[:count])
    stop[START] = True
    return stop


def plainly(params, stop, count, length):
    """Every token from a forward of all before it, drawn with the key of its part and position."""
    forward = jax.jit(lambda params, tokens, at: decoder.logits(params, tokens)[:, at - 1])
    found = []
    for part in range(-(-count // SAMPLE_SLOTS)):
        key = jax.random.fold_in(jax.random.key(SEED), part)
        tokens = np.full((SAMPLE_SLOTS, length), START, np.int32)
        for at in range(1, length):
            scores = np.asarray(forward(params, tokens, at))  # causal: what follows is not seen
            tokens[:, at] = jax.random.categorical(jax.random.fold_in(key, at), scores)
        for row in tokens:
            ends = np.flatnonzero(stop[row[1:]])
            found.append(row[: ends[0] + 2 if len(ends) else length].tolist())
    return found[:count]


@pytest.mark.parametrize("mesh", [{"data": 1, "model": 1}, {"data": 4, "model": 2}], ids=["one", "eight"])
def test_samples_are_token_for_token_those_of_the_plain_forward(tiny_model_dir, mesh):
    """Of more sequences than slots; some end early, with the token that ends them, others have no end."""
    model = load_model(str(tiny_model_dir), mesh=mesh)
    stop, count, length = stop_set(20), SAMPLE_SLOTS + 30, 12
    found = sample(model.params, model.mesh, START, stop, SEED, (count, length))
    assert found == plainly(model.params, stop, count, length)
    ended = [stop[own[-1]] for own in found]
    assert any(ended) and not all(ended)
    assert {len(own) for own, end in zip(found, ended, strict=True) if not end} == {length}
    assert not any(stop[own[1:-1]].any() for own in found)  # nothing after an end
    assert len({len(own) for own in found}) > 5 and len(set(map(tuple, found))) > count / 2


def test_overrides_are_sampled_from(model):
    """The edited model, not the frozen weights."""
    edited = model.with_overrides({"model.layers.1.mlp.down_proj.weight": np.zeros((32, 64), np.float32)})
    stop, shape = stop_set(20), (8, 12)
    found = sample(edited.params, model.mesh, START, stop, SEED, shape)
    assert found == plainly(edited.params, stop, *shape)
    assert found != sample(model.params, model.mesh, START, stop, SEED, shape)


def test_the_shortest_samples(model):
    everything = np.ones(320, bool)  # any token ends them
    assert sample(model.params, model.mesh, START, everything, SEED, (3, 1)) == [[START]] * 3
    found = sample(model.params, model.mesh, START, everything, SEED, (3, 12))
    assert found == plainly(model.params, everything, 3, 12) and {len(own) for own in found} == {2}

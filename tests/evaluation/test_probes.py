"""Which probes an edit is asked, and their tokens."""

import dataclasses

import numpy as np

from locft_jax.data.capability import CapabilityItem
from locft_jax.data.requests import EditRequest
from locft_jax.evaluation.probes import KINDS, Probe, make_probes, make_questions
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_tokenizer

REQUESTS = [
    EditRequest(
        case=f"c{i}",
        prompt=f"p{i}",
        target_new=f"t{i}",
        rephrases=(f"r{i}a", f"r{i}b"),
        locality=((f"l{i}", "known"), (f"m{i}", None)),
        portability=((f"q{i}", f"t{i}!"),),
    )
    for i in range(5)
]


def test_every_probe_of_every_request_in_order():
    probes = make_probes(REQUESTS[:1])
    assert probes == [
        Probe("c0", "reliability", "p0", "t0"),
        Probe("c0", "generalization", "r0a", "t0"),
        Probe("c0", "generalization", "r0b", "t0"),
        Probe("c0", "locality", "l0", "known"),
        Probe("c0", "locality", "m0", None),
        Probe("c0", "portability", "q0", "t0!"),
    ]
    assert make_probes(REQUESTS[:1], trained=1) == [probes[0], *probes[2:]]  # the edit shows the first
    assert len(make_probes(REQUESTS)) == 30 and make_probes([]) == []


def test_a_sample_is_seeded_and_of_each_kind():
    every = make_probes(REQUESTS)
    sample = make_probes(REQUESTS, 4, seed=1)
    assert sample == make_probes(REQUESTS, 4, seed=1) != make_probes(REQUESTS, 4, seed=2)
    assert {kind: sum(p.kind == kind for p in sample) for kind in KINDS} == dict.fromkeys(KINDS, 4)
    assert [every.index(p) for p in sample] == sorted(every.index(p) for p in sample)
    assert len(set(sample)) == 16
    assert make_probes(REQUESTS, 100) == every


def test_probes_are_plain_values():
    assert dataclasses.asdict(make_probes(REQUESTS)[0]) == {
        "case": "c0",
        "kind": "reliability",
        "prompt": "p0",
        "target": "t0",
        "batch": 0,
    }


def test_prompts_are_tokenized_as_they_were_trained(tiny_model_dir):
    items = [
        CapabilityItem("sums", "Ten plus five is", "15"),
        CapabilityItem("pick", "Is it?", "no", ("yes", "no")),
    ]
    folder = open_folder(str(tiny_model_dir))
    tokenizer = load_tokenizer(folder)
    asked = [
        Probe("0", "reliability", "The capital of Oredal is", "Vintown"),
        Probe("1", "generalization", "Who founded the firm?", "Mira Halver"),
        Probe("0", "locality", "Hana works as", "a baker"),
        Probe("0", "locality", "Ten plus five is", None),
    ]
    made = make_questions(tokenizer, asked, items, folder.spec)
    assert made.probes[:4] == asked and made.probes[4:] == [
        Probe("sums", "capability", "Ten plus five is", "15"),
        Probe("pick", "capability", "Is it?", "no"),
    ]
    assert made.choices == {5: ("yes", "no")}
    assert made.free() == [0, 1, 2, 3, 4]
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    for probe, prompt, target in zip(made.probes, made.prompts, made.targets, strict=True):
        assert prompt == ids(probe.prompt)
        assert target == (ids(" " + probe.target) if probe.target else [])
    texts = np.split(made.choice_pairs.tokens, made.choice_pairs.offsets[1:-1])
    assert [text.tolist() for text in texts] == [ids("Is it? yes"), ids("Is it? no")]
    assert made.choice_pairs.target_start.tolist() == [len(ids("Is it?"))] * 2

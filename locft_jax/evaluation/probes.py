"""What a model is asked: probes of the edits and capability items, and their token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from locft_jax.data.capability import CapabilityItem
from locft_jax.data.packing import Corpus, corpus_from_lists
from locft_jax.data.requests import EditRequest
from locft_jax.data.tokenize import as_encoder, check_prompts, encode_pairs, prompt_ids
from locft_jax.model.spec import ModelSpec

NEW_TOKENS = 32
KINDS = ("reliability", "generalization", "locality", "portability")
CAPABILITY = "capability"


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One question to the model. `target` None: no known answer, only agreement is measured."""

    case: str
    kind: str  # one of KINDS, or "capability"
    prompt: str
    target: str | None
    batch: int = 0  # of the request it belongs to


def make_probes(
    requests: Sequence[EditRequest], sample: int | None = None, seed: int = 0, trained: int = 0
) -> list[Probe]:
    """Every probe of the requests but the first `trained` rephrases of each, which the edit shows to the
    model; `sample` keeps a seeded random choice of that many of each kind."""
    probes: list[Probe] = []
    for r in requests:
        probes.append(Probe(r.case, "reliability", r.prompt, r.target_new, r.batch))
        probes += [Probe(r.case, "generalization", p, r.target_new, r.batch) for p in r.rephrases[trained:]]
        probes += [Probe(r.case, "locality", p, a, r.batch) for p, a in r.locality]
        probes += [Probe(r.case, "portability", p, a, r.batch) for p, a in r.portability]
    if sample is None:
        return probes
    rng = np.random.default_rng(seed)
    by_kind = [[i for i, p in enumerate(probes) if p.kind == kind] for kind in KINDS]
    kept = [which[i] for which in by_kind for i in rng.permutation(len(which))[:sample]]
    return [probes[i] for i in sorted(kept)]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Probes made ready: token ids of each prompt, and of what it is expected to be answered."""

    probes: list[Probe]
    prompts: list[list[int]]
    targets: list[list[int]]  # the target's ids; empty where there is no target
    choices: dict[int, tuple[str, ...]]  # probe -> choices that are scored by log-likelihood
    # A text for each choice of each of these probes, in their order.
    choice_pairs: Corpus = dataclasses.field(default_factory=lambda: corpus_from_lists([], []))

    def free(self) -> list[int]:
        """The probes that are answered freely, without choices."""
        return [i for i in range(len(self.probes)) if i not in self.choices]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the model said, probe by probe."""

    texts: list[str]  # by the official stop rule (for choices: the choice taken)
    full: list[str]  # of reliability probes: until EOS, or until they cannot match any more
    tokens: list[list[int]]  # by the official stop rule, stop token included; empty for choices
    verified: int  # how many answers one forward pass over drafts verified


def make_questions(
    tokenizer: Any,
    probes: Sequence[Probe],
    capability: Sequence[CapabilityItem],
    spec: ModelSpec,
    chat_template: bool = False,
) -> Questions:
    """Probes and capability items as token ids. Raises UserError, as `encode_pairs` does, for what could not
    be asked: texts without tokens, longer than the model's context, or beyond its vocabulary."""
    encoder = as_encoder(tokenizer)
    every = [*probes, *(Probe(item.task, CAPABILITY, item.prompt, item.answer) for item in capability)]
    limits: Any = {"max_length": spec.max_position, "vocab_size": spec.vocab_size}
    known = [i for i, p in enumerate(every) if p.target]
    texts = [every[i].prompt for i in known], [str(every[i].target) for i in known]
    pairs = encode_pairs(encoder, *texts, chat_template=chat_template, **limits)
    choices = {len(probes) + i: item.choices for i, item in enumerate(capability) if item.choices}
    texts = [every[i].prompt for i in choices for _ in choices[i]], [c for i in choices for c in choices[i]]
    choice_pairs = encode_pairs(encoder, *texts, **limits)
    prompts = prompt_ids(encoder, [p.prompt for p in every], chat_template)
    unknown = [i for i, p in enumerate(every) if not p.target]
    check_prompts([every[i].prompt for i in unknown], [prompts[i] for i in unknown], **limits)
    targets: list[list[int]] = [[] for _ in every]
    for row, i in enumerate(known):
        ids = pairs.tokens[pairs.offsets[row] : pairs.offsets[row + 1]].tolist()
        prompts[i], targets[i] = ids[: pairs.target_start[row]], ids[pairs.target_start[row] :]
    return Questions(every, prompts, targets, choices, choice_pairs)

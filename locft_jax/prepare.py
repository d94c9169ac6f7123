"""`prepare(config) -> Prepared`: all that a run needs but the weights. What can be wrong with a run is
found here, before any weight is loaded. Commands, studies and the Python API start from it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from locft_jax.config import Config, config_to_dict
from locft_jax.data.capability import CapabilityItem, read_capability
from locft_jax.data.packing import Corpus
from locft_jax.data.records import digest
from locft_jax.data.requests import EditData, read_requests
from locft_jax.data.tokenize import TextEncoder
from locft_jax.editing.augment import prefix_texts, written_prefixes
from locft_jax.editing.hooks import check_reporters
from locft_jax.editing.regularizers.preconditioner import check_preserve
from locft_jax.editing.regularizers.texts import encode_retained, retained_texts, sample_model, unused
from locft_jax.editing.run import check_fit, choose_site, encode_requests
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import Probe, Questions, make_probes, make_questions
from locft_jax.io.delta import Delta, check_delta
from locft_jax.io.hf_folder import HFFolder, open_folder
from locft_jax.io.hf_load import frozen_dtype, load_opened, load_tokenizer
from locft_jax.model.memory import check_memory
from locft_jax.model.model import Model
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import ModelSpec
from locft_jax.run_identity import FREE_KEYS, base_digest, versions

Site = tuple[str, ...]  # HF names of the tensors that are tuned


@dataclass(frozen=True)
class Base:
    """The model that a run starts from. Of one that is only planned there may be no more than a `spec`."""

    spec: ModelSpec
    folder: HFFolder | None = None
    encoder: TextEncoder | None = None
    mesh: Mesh | None = None
    model: Model | None = None  # where it is loaded already

    @classmethod
    def loaded(cls, model: Model) -> "Base":
        return cls(model.spec, model.folder, TextEncoder(model.tokenizer), model.mesh, model)


class Opened:
    """What several configs have in common, opened once: folders, tokenizers with their texts, data."""

    def __init__(self) -> None:
        self.folder = functools.cache(open_folder)
        self.requests = functools.cache(read_requests)
        self.capability = functools.cache(read_capability)
        self.encoder = functools.cache(lambda path: TextEncoder(load_tokenizer(self.folder(path))))

    def base(self, config: Config) -> Base:
        folder = self.folder(config.model_name_or_path)
        return Base(folder.spec, folder, self.encoder(config.model_name_or_path), make_mesh(config.mesh))


@dataclass(frozen=True)
class Prepared:
    """A run that has been looked at: nothing that a user gave is wrong, and no weight is loaded."""

    config: Config
    base: Base
    data: EditData
    capability: Sequence[CapabilityItem]
    sites: tuple[Site, ...]  # one for an edit, many for a study of sites, none where nothing is edited
    corpus: Corpus | None  # training texts; None where nothing is edited, or without a tokenizer
    questions: Questions | None  # None where nothing is asked
    texts: Sequence[str] | None  # retained texts; None: none, or the model's own
    retained: list[list[int]] | None  # their ids; None: to be sampled from the model
    notes: list[str]  # for the user
    delta: Delta | None = None  # an earlier edit of the model: where an edit begins, or what is measured

    @property
    def site(self) -> Site:
        return self.sites[0] if len(self.sites) == 1 else ()

    @property
    def folder(self) -> HFFolder:
        assert self.base.folder is not None
        return self.base.folder

    @property
    def mesh(self) -> Mesh:
        assert self.base.mesh is not None
        return self.base.mesh

    @property
    def tokenizer(self) -> Any:
        assert self.base.encoder is not None
        return self.base.encoder.tokenizer

    def over(self, delta: Delta) -> "Prepared":
        """The same with an earlier edit. Raises UserError where it is one of another model."""
        check_delta(self.folder, delta)
        return dataclasses.replace(self, delta=delta)

    def load(self) -> Model:
        """The model, without `delta`."""
        return self.base.model or load_opened(self.folder, self.tokenizer, self.mesh, self.config.weights)

    def complete(self, model: Model) -> "Prepared":
        """The same with the retained texts and prefixes that only the model can write. Raises UserError."""
        config, corpus, retained = self.config, self.corpus, self.retained
        if corpus is not None and config.augment_prefixes and config.augment_data is None:
            prefixes = written_prefixes(model, config)
            corpus = encode_requests(self.base.encoder, self.data.requests, config, self.base.spec, prefixes)
        retained = sample_model(model, config.seed) if retained is None else retained
        return dataclasses.replace(self, corpus=corpus, retained=retained)

    def identity(self) -> dict[str, Any]:
        """All that the run's result follows from, in JSON types: another run must not resume from it."""
        texts = lambda given: digest([{"text": text} for text in given or ()])  # noqa: E731
        return {
            **{k: v for k, v in config_to_dict(self.config).items() if k not in FREE_KEYS},
            "mesh": dict(self.mesh.shape),
            "site": list(self.site),
            "data_sha256": self.data.sha256,
            "capability": digest([dataclasses.asdict(item) for item in self.capability]),
            "base_model": base_digest(self.folder, self.site),
            "architecture": digest([dataclasses.asdict(self.base.spec)]),
            "preserve_texts": texts(self.texts),
            "augment_texts": texts(prefix_texts(self.config)),
            "start": self.delta and digest([{n: a.tobytes().hex() for n, a in self.delta.new.items()}]),
            "versions": versions(),
        }


def config_site(spec: ModelSpec, config: Config) -> list[Site]:
    """The site that the config names. Raises UserError where the model has no such tensor."""
    return [choose_site(spec, config)]


def no_site(spec: ModelSpec, config: Config) -> list[Site]:
    """Nothing is edited."""
    return []


def prepare(
    config: Config, *, data: EditData | None = None, capability: Sequence[CapabilityItem] | None = None,
    probes: Sequence[Probe] | None = None, base: Base | None = None, opened: Opened | None = None,
    sites: Callable[[ModelSpec, Config], Sequence[Site]] = config_site,
) -> Prepared:  # fmt: skip
    """Look at everything that a run needs, and tokenize its texts: what is returned is ready to `load()`.
    Raises UserError for anything that is wrong with settings, data, model, site, texts or memory.

    Args:
        config: the run's settings.
        data: the edits; None: those of `data_path`.
        capability: questions that no edit is about; None: those of `capability_data`.
        probes: what is asked in place of the edits' own probes; data is then not needed.
        base: the model, where it is loaded or only planned; None: the config's, to be loaded.
        opened: what earlier calls have opened, for configs that share it.
        sites: which tensors are edited: `config_site`, `no_site`, or a study's own choice.
    """
    opened, own = opened or Opened(), probes is None
    check_reporters(config.report_to)
    if data is None:
        if config.data_path is None and own:
            raise UserError("data_path: no edits given; set data_path to a file (JSON, JSONL or CSV)")
        get = functools.partial(opened.requests, config.data_path, config.num_edits, config.on_conflict)
        data = get() if own else EditData([], 0, {}, "", "")
    if capability is None:
        capability = opened.capability(config.capability_data) if own and config.capability_data else []
    base = base or opened.base(config)
    spec, encoder = base.spec, base.encoder
    chosen = tuple(sites(spec, config))
    for site in chosen:
        check_preserve(spec, site, config)
    texts = retained_texts(config, data.requests) if chosen else None
    corpus = questions = None
    retained: list[list[int]] | None = []
    if encoder is not None and chosen:
        retained = encode_retained(encoder, spec, config, texts)
        corpus = encode_requests(encoder, data.requests, config, spec)
    if encoder is not None and (config.evaluate or not chosen):
        if probes is None:
            probes = make_probes(data.requests, config.eval_sample, config.seed, config.augment_rephrases)
        questions = make_questions(encoder, probes, capability, spec, config.chat_template)
    notes = (unused(config) if chosen else []) + _fits(config, base, chosen, corpus)
    return Prepared(config, base, data, capability, chosen, corpus, questions, texts, retained, notes)


def _fits(config: Config, base: Base, sites: Sequence[Site], corpus: Corpus | None) -> list[str]:
    """Warnings of memory that may not suffice, each once. Raises UserError where it certainly does not."""
    if base.folder is None or base.mesh is None or base.model is not None:
        return []
    if corpus is None:
        itemsize = frozen_dtype(base.folder, config.weights).itemsize
        return check_memory(base.spec, base.mesh, itemsize, int8=config.weights == "int8")
    warnings = (w for site in sites for w in check_fit(base.folder, config, site, corpus, base.mesh))
    return list(dict.fromkeys(warnings))

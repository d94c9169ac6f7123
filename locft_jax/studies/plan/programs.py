"""An edit before there is a machine: the model's shape, the site, the lengths of its texts, and its programs
on a mesh. Nothing is downloaded or computed, and no array exists: shapes and shardings stand in for weights,
state and batches."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import Mesh, NamedSharding

from locft_jax.config import Config
from locft_jax.data import packing
from locft_jax.data.packing import Batch, Corpus, Rows
from locft_jax.data.requests import read_requests
from locft_jax.data.tokenize import TextEncoder
from locft_jax.editing import step
from locft_jax.editing.regularizers import kl, second_moments, texts
from locft_jax.editing.regularizers.preconditioner import check_preserve, side_shardings
from locft_jax.editing.run import choose_site, schedule_of
from locft_jax.editing.site import first_layer
from locft_jax.editing.trainer import run_shape, visits
from locft_jax.errors import UserError
from locft_jax.evaluation.probes import NEW_TOKENS
from locft_jax.evaluation.verify import packed
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_tokenizer
from locft_jax.model import activation_cache, decode, sharding
from locft_jax.model.activation_cache import Inputs
from locft_jax.model.spec import ModelSpec, parse_spec, read_config
from locft_jax.model.weights import Params, abstract_weights, locate_tensor
from locft_jax.prepare import Base, prepare

EDITS = 3000  # where the config does not say how many
SAMPLE = 3000  # texts that batches are made of, where lengths are assumed
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHAPES = Path(__file__).resolve().parents[3] / "configs" / "models"  # of a source tree


@dataclasses.dataclass(frozen=True)
class Case:
    """An edit that is planned."""

    spec: ModelSpec
    config: Config
    dtype: np.dtype  # of activations, and of the frozen weights unless these are int8
    site: tuple[str, ...]
    corpus: Corpus  # the edits' texts, or some of the same lengths
    edits: int  # in all

    @property
    def int8(self) -> bool:
        return self.config.weights == "int8"

    @property
    def weights(self) -> str:
        return "int8" if self.int8 else str(self.dtype)

    @property
    def layer(self) -> int:
        return first_layer(self.spec, self.site)

    @property
    def tokens(self) -> int:
        """Of all edits."""
        return round(self.edits * len(self.corpus.tokens) / self.corpus.edits)


def make_case(config: Config, model_config: Path | None = None) -> tuple[Case, list[str]]:
    """What the config edits, and notes on what had to be assumed. `model_config`: the model's config.json.
    Raises UserError for a model of which no config.json is here, and where the edit itself would."""
    if model_config is not None and not model_config.exists():
        raise UserError(f"--model-config: no file {str(model_config)!r}")
    path = model_config or find_shape(config)
    values = read_config(path)
    spec = parse_spec(values, str(path))
    folder = open_folder(str(path)) if path.is_dir() and any(path.glob("*.safetensors")) else None
    named = str(values.get("dtype") or values.get("torch_dtype"))
    stored = folder.dtype if folder else DTYPES.get(named, ml_dtypes.bfloat16)
    dtype = np.dtype(stored if config.weights in ("checkpoint", "int8") else DTYPES[config.weights])
    here = config.data_path if config.data_path and Path(config.data_path).is_file() else None
    if here and folder:
        base = Base(spec, folder, TextEncoder(load_tokenizer(folder)))
        prepared = prepare(dataclasses.replace(config, evaluate=False, eval_every=None), base=base)
        assert prepared.corpus is not None
        edits = len(prepared.data.requests)
        return Case(spec, config, dtype, prepared.site, prepared.corpus, edits), []
    site, edits = choose_site(spec, config), config.num_edits or EDITS
    check_preserve(spec, site, config)
    if here:
        edits = len(read_requests(here, config.num_edits, config.on_conflict).requests)
    corpus = assumed_corpus(min(edits, SAMPLE))
    note = (
        f"lengths are assumed, as in ZsRE: {corpus.lengths.mean():.1f} tokens an edit with target and EOS, "
        f"{corpus.lengths.max()} at most; a data file and a folder with the tokenizer here would give the "
        "real ones"
    )
    return Case(spec, config, dtype, site, corpus, edits), [note]


def find_shape(config: Config) -> Path:
    """What says what the config's model is: itself where it is here, else NAME.json in models/ beside the
    config, or in configs/models/ of this source tree. Raises UserError where there is none."""
    given = Path(os.path.expanduser(config.model_name_or_path))
    beside = [Path(config.source).parent / "models"] if config.source else []
    for path in (given, *(folder / f"{given.name}.json" for folder in (*beside, SHAPES))):
        if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".json"):
            return path
    raise UserError(
        f"model_name_or_path: no config.json of {config.model_name_or_path!r} is here, and a plan downloads "
        "nothing; give the file with --model-config FILE, or a folder with --set model_name_or_path=FOLDER"
    )


def assumed_corpus(edits: int) -> Corpus:
    """Texts of ZsRE-like lengths: prompts of 6 to 32 tokens (mean 15), targets of 1 to 16 (mean 4), EOS."""
    rng = np.random.default_rng(0)
    prompts = np.clip(np.round(rng.gamma(9.0, 15 / 9, edits)), 6, 32).astype(int)
    targets = np.clip(np.round(rng.gamma(2.2, 4 / 2.2, edits)), 1, 16).astype(int)
    return packing.corpus_from_lists([np.zeros(n, np.int32) for n in prompts + targets + 1], prompts)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run. `weights`, `tuned`: bytes a chip among its arguments; `beside`: what the run
    keeps on a chip meanwhile that is no argument of it."""

    name: str
    trace: Callable[[], Any]  # -> jax.stages.Traced
    weights: int
    tuned: int
    beside: int = 0


def product_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of a traced program's matrix products, on all chips together. (The compiler's `cost_analysis`
    counts the body of a loop, which here is every layer but a few, once.) Of an open loop: one turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            left: Any = eqn.invars[0].aval
            out: Any = eqn.outvars[0].aval
            total += 2 * out.size * math.prod(left.shape[i] for i in summed)
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]  # closed ones hold an open one
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += turns * sum(product_flops(j) for j in inner if hasattr(j, "eqns"))
    return total


shaped = jax.ShapeDtypeStruct  # an array on devices, without its values


def on(tree: Any, shardings: Any) -> Any:
    """A tree of arrays or shapes as shapes with these shardings."""
    return jax.tree.map(lambda a, s: shaped(a.shape, a.dtype, sharding=s), tree, shardings)


def chip_bytes(tree: Any) -> int:
    """Bytes of the arrays' shards on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


class Shapes:
    """What the case's programs are given on a mesh of chips with `memory` bytes each."""

    def __init__(self, case: Case, mesh: Mesh, memory: float) -> None:
        self.case, self.mesh, self.split = case, mesh, mesh.shape["data"]
        self.everywhere = functools.partial(shaped, sharding=sharding.replicated(mesh))
        weights = abstract_weights(case.spec, case.dtype, case.int8)
        self.weights = on(weights, sharding.weight_shardings(mesh, case.spec, case.int8))
        self.params, self.state = Params(case.spec, self.weights), self.tuned()
        self.held = chip_bytes(self.weights), chip_bytes(self.state)
        asked, stated = case.config.activation_cache, case.config.memory_budget
        device = 0.8 * max(0.0, memory - sum(self.held)) if stated is None else stated * 2**30
        budgets = device, math.inf
        self.mode = activation_cache.mode_for(self.params, mesh, asked, case.layer, case.tokens, budgets)
        self.start = 0 if self.mode == "off" else case.layer

    def tuned(self) -> step.EditState:
        """Moments are sharded as their tensors, counts replicated."""
        rows = {n: locate_tensor(self.case.spec, n)[0] for n in self.case.site}
        where = {n: sharding.tensor_sharding(self.mesh, self.case.spec, r, False) for n, r in rows.items()}
        state = jax.eval_shape(step.init_state, {n: shaped(r.shape, np.float32) for n, r in rows.items()})
        own = lambda path, _: where.get(getattr(path[-1], "key", ""), sharding.replicated(self.mesh))  # noqa: E731
        return on(state, jax.tree_util.tree_map_with_path(own, state))

    def unread(self, *keys: str) -> int:
        """Bytes on one device of weights that a program does not read: `jax.jit` leaves them out of its
        arguments. Tied, the embedding is the head too."""
        tied = "head" not in self.weights
        return chip_bytes([a for k, a in self.weights.items() if k in keys and not (tied and k == "embed")])

    def batch(self, batch: Batch | None) -> Batch:
        """A packed batch as `place_batch` sends it."""
        assert batch is not None, "the shape was made for it"
        return on(batch, sharding.batch_shardings(batch, self.mesh))

    def inputs(self, batch: Batch) -> Inputs:
        """What a step looks a batch up in: of the corpus on the device, else of the batch alone."""
        if self.start == 0:
            return Inputs(self.everywhere((self.case.tokens,), np.int32), 0)
        shape = self.case.tokens if self.mode == "device" else batch.index.size, self.case.spec.d_model
        where = sharding.source_sharding(self.mesh, shape)
        return Inputs(shaped(shape, self.case.dtype, sharding=where), self.start)

    def sides(self) -> dict[str, step.Sides]:
        """The matrices that updates are multiplied with."""
        spec, method, made = self.case.spec, self.case.config.preserve, dict[str, step.Sides]()
        for name in second_moments.matrices_of(spec, self.case.site) if method != "none" else ():
            out, width = locate_tensor(spec, name)[0].shape
            columns, rows = side_shardings(self.mesh, spec, name)
            made[name] = self.side(width, columns), self.side(out, rows) if method == "kfac" else None
        return made

    def side(self, width: int, where: NamedSharding) -> Any:
        """P of inputs, or outputs, of this width."""
        exact = width <= second_moments.EXACT
        rank = width if exact else second_moments.RANK
        basis = shaped((width, rank), np.float32, sharding=where)
        return basis if exact else step.LowRank(basis, self.everywhere((rank,), np.float32))

    def retain_batch(self) -> step.RetainBatch | None:
        """Retained texts: as long as those sampled from the model can be, else as the edits' prompts."""
        config, lengths = self.case.config, self.case.corpus.target_start[: kl.TEXTS]
        if not config.preserve_kl:
            return None
        if texts.source_of(config) == "model":
            lengths = np.full(kl.TEXTS, min(texts.SAMPLE_LENGTH, config.row_length))
        starts = lengths if config.preserve_tokens == "last" else np.ones(len(lengths))
        corpus = packing.corpus_from_lists([np.zeros(n + 1, np.int32) for n in lengths], starts)
        every = np.arange(len(corpus))
        shape = packing.fit_shape(corpus, [every], config.row_length, self.split)
        batch = self.batch(packing.pack(corpus, every, shape, "token"))
        inputs = self.inputs(batch)
        known = jax.eval_shape(kl.expected, self.params, inputs, batch)
        ids, logp, rest = (self.everywhere(a.shape, a.dtype) for a in known)
        return step.RetainBatch(inputs, batch, ids, logp, rest, self.everywhere((), np.float32))

    def train(self) -> Program:
        """The training step on mini-batches as the run makes them."""
        corpus, schedule = self.case.corpus, dataclasses.replace(schedule_of(self.case.config), epochs=1)
        which = corpus.examples_of(next(visits(corpus, schedule)).which)
        batch = self.batch(packing.pack(corpus, which, run_shape(corpus, schedule, self.mesh)))
        hyper = jax.tree.map(lambda _: self.everywhere((), np.float32), schedule.hyper)
        more = step.Regularizers(self.sides(), self.retain_batch())
        given = hyper, self.state, self.params, self.inputs(batch), batch, more
        beside = self.unread("embed") if self.start else 0
        return Program("train step", functools.partial(step.train_step.trace, *given), *self.held, beside)

    def cache(self) -> Program:
        """The pass that fills the activation cache; the tuned state is there already."""
        rows_of = self.case.corpus, self.case.config.row_length, activation_cache.ROWS, self.split
        length, rows = packing.even_rows(*rows_of)
        grid = shaped((rows, length), np.int32, sharding=sharding.rows_sharding(self.mesh, rows))
        given = self.case.layer, self.params, grid, Rows(grid, grid)
        trace = functools.partial(activation_cache.cache_pass.trace, *given)
        return Program("cache pass", trace, self.held[0], 0, self.held[1] + self.unread("norm", "head"))

    def evaluation(self) -> list[Program]:
        """The teacher-forced pass over the edited prompts, and one decoding step with every slot filled."""
        case, corpus, new = self.case, self.case.corpus, self.state.theta
        edits: Any = {n: shaped(a.shape, case.dtype, sharding=a.sharding) for n, a in new.items()}
        params, ids = self.params.over(edits), self.everywhere((case.tokens,), np.int32)
        _, first = next(packed(corpus, np.arange(len(corpus)), case.config.row_length, self.mesh))
        read = functools.partial(decode.read_batch.trace, case.layer, params, ids, self.batch(first))
        most, length = packing.few_sizes(decode.MOST, 16, 4), int(corpus.lengths.max())
        sizes = most, packing.few_sizes(length, 32, 1), NEW_TOKENS - 1
        slots = decode.abstract_slots(params, self.mesh, *sizes)
        stop, enough = self.everywhere((case.spec.vocab_size,), np.bool_), self.everywhere((), np.int32)
        make = functools.partial(decode.decode.trace, params, slots, stop, enough)
        held, caches = (self.held[0], chip_bytes(edits)), chip_bytes((slots.keys, slots.values))
        return [Program("evaluation pass", read, *held, caches), Program("decoding step", make, *held)]


def programs(case: Case, mesh: Mesh, memory: float) -> list[Program]:
    """The programs of an edit on a mesh of chips with `memory` bytes each."""
    shapes = Shapes(case, mesh, memory)
    cached = [shapes.cache()] if shapes.mode != "off" else []
    return [shapes.train(), *cached, *(shapes.evaluation() if case.config.evaluate else [])]

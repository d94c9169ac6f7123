"""One edit of one model, from requests to tuned tensors: the site, its data, its cache, its loop."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from locft_jax import distributed
from locft_jax.config import Config, resolve_layers
from locft_jax.data.packing import Corpus
from locft_jax.data.requests import EditRequest
from locft_jax.data.tokenize import encode_pairs
from locft_jax.editing.augment import prefix_texts, training_prompts
from locft_jax.editing.checkpointer import Checkpointer
from locft_jax.editing.regularizers.kl import make_keep
from locft_jax.editing.regularizers.preconditioner import Lambdas, make_preserve
from locft_jax.editing.site import find_site, first_layer, materialize, parameters, read_site
from locft_jax.editing.step import Hyper, init_state
from locft_jax.editing.trainer import Outcome, Schedule, StepRecord, run_pipeline
from locft_jax.errors import UserError
from locft_jax.io.delta import Delta, check_delta, load_delta
from locft_jax.io.hf_folder import HFFolder
from locft_jax.io.hf_load import frozen_dtype, originals
from locft_jax.io.hf_save import to_checkpoint_dtype
from locft_jax.model.activation_cache import Source, cached_source, choose_mode
from locft_jax.model.memory import check_memory, step_of
from locft_jax.model.model import Model
from locft_jax.model.sharding import width_split
from locft_jax.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Edited:
    """The tuned tensors as they will be exported, and how the run went."""

    tensors: dict[str, np.ndarray]  # HF name -> matrix, HF layout, checkpoint dtype
    outcome: Outcome
    parameters: int
    prefix_cache: str  # the mode that was chosen
    boundary_merges: int
    seconds: float
    lambdas: Lambdas  # of `preserve`


def choose_site(spec: ModelSpec, config: Config) -> tuple[str, ...]:
    """The config's site in this model. Raises UserError as `find_site` does."""
    modules = [config.rewrite_module] if isinstance(config.rewrite_module, str) else config.rewrite_module
    return find_site(spec, modules, resolve_layers(config, spec.n_layers))


def schedule_of(config: Config) -> Schedule:
    """The part of a config that the loop reads."""
    return Schedule(
        batch_size=config.batch_size,
        epochs=config.num_steps,
        seed=config.seed,
        average=config.loss_average,
        row_length=config.row_length,
        hyper=Hyper(config.lr, config.weight_decay, config.loss_floor, config.norm_constraint),
        pipeline=config.pipeline,
        eval_every=config.eval_every or 1,
    )


def encode_requests(
    model_tokenizer: object,
    requests: Sequence[EditRequest],
    config: Config,
    spec: ModelSpec,
    prefixes: Sequence[str] | None = None,
) -> Corpus:
    """Training texts of the requests, EOS included (method.md, An edit), and those that the config's
    `augment_...` keys add; `prefixes`: random texts (default: as `prefix_texts` has them without the model).
    For `ft-l` only the last token of a target is trained; EOS, which says nothing of the fact, is left out.
    Raises UserError when the tokenizer has no EOS to append, or as `encode_pairs` and `prefix_texts` do."""
    eos = getattr(model_tokenizer, "eos_token_id", None)
    append = config.append_eos and config.method != "ft-l"
    if append and eos is None:
        raise UserError("append_eos: this model's tokenizer has no EOS token; use append_eos=false")
    prompts = training_prompts(requests, config, prefix_texts(config) if prefixes is None else prefixes)
    counts = [len(own) for own in prompts]
    corpus = encode_pairs(
        model_tokenizer,
        [prompt for own in prompts for prompt in own],
        [r.target_new for r, count in zip(requests, counts, strict=True) for _ in range(count)],
        eos=eos if append else None,
        chat_template=config.chat_template,
        max_length=spec.max_position,
        vocab_size=spec.vocab_size,
    )
    if max(counts, default=1) > 1:
        corpus = dataclasses.replace(corpus, edit=np.repeat(np.arange(len(counts)), counts))
    last = corpus.lengths - 1
    return dataclasses.replace(corpus, target_start=last) if config.method == "ft-l" else corpus


def check_fit(
    checkpoint: HFFolder, config: Config, site: Sequence[str], corpus: Corpus, mesh: Mesh
) -> list[str]:
    """Warnings of memory that may not suffice. Raises UserError, before any weight is loaded, where it
    certainly does not, or as `choose_mode` does."""
    spec, itemsize = checkpoint.spec, frozen_dtype(checkpoint, config.weights).itemsize
    int8 = config.weights == "int8"
    layer = first_layer(spec, site)
    cache = len(corpus.tokens) * spec.d_model * itemsize
    split = width_split(mesh, spec.d_model)
    choose_mode(config.prefix_cache, layer, cache, *memory_budgets(config.memory_budget), split)
    step = step_of(corpus, config.batch_size, config.row_length, layer)
    return check_memory(spec, mesh, itemsize, site, step, int8=int8)


def run_edit(
    model: Model,
    corpus: Corpus,
    site: Sequence[str],
    config: Config,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    start: Mapping[str, np.ndarray] | None = None,
    checkpoints: Checkpointer | None = None,
    retained: Sequence[Sequence[int]] = (),
    source: Source | None = None,
    watch: Callable[[dict[str, np.ndarray], Sequence[StepRecord]], None] | None = None,
) -> Edited:
    """LocFT-BF on one model: the given model is not changed. `start`: values that the site's tensors
    begin with (HF names; default: the model's own). With `checkpoints` the run goes on from the newest
    one and leaves others; `on_step` is told of the steps made before too. `retained`: token ids of texts for
    the config's `preserve...` keys, as `retained_ids` gives them. `source`: the corpus as it enters the
    site's lowest layer, from a caller who edits at many sites (default: made here). `watch` is given the
    site's tensors, as they would be exported, after every `eval_every` epochs (depth-first: mini-batches).

    Raises NonFiniteLoss, and Interrupted when a signal asked to stop.
    """
    begin = time.monotonic()
    layer = first_layer(model.spec, site)
    base, stored = model.overrides, originals(model, site)
    given: dict[str, Any] = {**stored, **base, **(start or {})}
    state = init_state(read_site(model.spec, model.weights, site, model.mesh, given))
    if config.norm_constraint is not None:  # a step looks at what it began from
        base = model.with_overrides(stored, np.float32).overrides
    del stored, given
    done: list[StepRecord] = []
    if checkpoints is not None:
        state, done = checkpoints.restore(state) or (state, done)
        checkpoints.start()
        for record in done:
            on_step(record)
    if source is None:
        mode = cache_mode(model, corpus, layer, config)
        source = cached_source(
            model.spec, model.weights, corpus, layer, mode, model.mesh, config.row_length, base=base
        )
    preserve, lambdas = make_preserve(model, site, config, retained)
    keep = make_keep(model, site, source, config, retained, agreed_budgets(config))
    exported = lambda theta: to_checkpoint_dtype(model.folder, materialize(theta, base))  # noqa: E731
    look = lambda state, records: watch(exported(state.theta), records) if watch else None  # noqa: E731
    outcome = run_pipeline(
        model.spec,
        model.weights,
        state,
        corpus,
        source,
        schedule_of(config),
        model.mesh,
        on_step,
        base=base,
        done=done,
        keeper=checkpoints,
        preserve=preserve,
        keep=keep,
        watch=look if watch else None,
    )
    tensors = exported(outcome.state.theta)
    seconds = time.monotonic() - begin
    if checkpoints is not None:
        seconds = checkpoints.finish(outcome.state, outcome.records)
    return Edited(
        tensors,
        outcome,
        parameters(outcome.state.theta),
        source.mode,
        corpus.boundary_merges,
        seconds,
        lambdas,
    )


def cache_mode(model: Model, corpus: Corpus, layer: int, config: Config) -> str:
    """Where the activations that enter `layer` are kept, as `choose_mode` says."""
    size = len(corpus.tokens) * model.spec.d_model * np.dtype(model.dtype).itemsize
    split = width_split(model.mesh, model.spec.d_model)
    return choose_mode(config.prefix_cache, layer, size, *agreed_budgets(config), split)


def agreed_budgets(config: Config) -> tuple[float, float]:
    """`memory_budgets`, of several processes the least."""
    device, host = distributed.least(*memory_budgets(config.memory_budget))
    return device, host


def last_delta(folder: str | Path, checkpoint: HFFolder, site: Sequence[str]) -> Delta:
    """The delta of an earlier run, to begin with. Raises UserError unless it was made on this model and
    tunes this site."""
    delta = load_delta(f"{folder}/delta.safetensors")
    check_delta(checkpoint, delta)
    if set(delta.new) != set(site):
        raise UserError(
            f"--start-from last: {folder} tuned {', '.join(sorted(delta.new)[:3])}..., this run tunes "
            f"{', '.join(site[:3])}...; use the same site, or --start-from base"
        )
    return delta


def memory_budgets(stated: float | None) -> tuple[float, float]:
    """Bytes that caches may take (on each device, on the host): what was stated (GiB), else 80 % of what
    is free here."""
    if stated is not None:
        return stated * 2**30, stated * 2**30
    host = 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return host / len(jax.local_devices()), host  # the devices are the host
    return 0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)), host

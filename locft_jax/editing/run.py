"""One edit of one model, from training texts to tuned tensors: activation cache, regularizers, loop."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from locft_jax import distributed
from locft_jax.config import Config, resolve_layers
from locft_jax.data.packing import Corpus
from locft_jax.data.requests import EditRequest
from locft_jax.data.tokenize import as_encoder, encode_pairs
from locft_jax.editing.augment import prefix_texts, training_prompts
from locft_jax.editing.checkpointer import Checkpointer
from locft_jax.editing.hooks import Evaluate, Hook, StepRecord
from locft_jax.editing.regularizers.kl import retain_batches
from locft_jax.editing.regularizers.preconditioner import Lambdas, make_preconditioner
from locft_jax.editing.regularizers.second_moments import Ids
from locft_jax.editing.site import find_site, first_layer, materialize, parameters, read_site
from locft_jax.editing.step import EditState, Hyper, Regularizers, init_state
from locft_jax.editing.trainer import Job, Outcome, Schedule, train
from locft_jax.errors import UserError
from locft_jax.io.delta import Delta, check_delta, load_delta
from locft_jax.io.hf_folder import HFFolder
from locft_jax.io.hf_load import frozen_dtype, originals
from locft_jax.io.hf_save import to_checkpoint_dtype
from locft_jax.model.activation_cache import Source, cached_source, choose_mode, mode_for
from locft_jax.model.memory import check_memory, memory_budgets, step_of
from locft_jax.model.model import Model
from locft_jax.model.sharding import width_split
from locft_jax.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class EditTask:
    """What is edited, and where."""

    site: tuple[str, ...]  # HF names
    corpus: Corpus  # training texts
    retained: Ids = ()  # texts for the config's `preserve...` keys
    start: Mapping[str, np.ndarray] | None = None  # what the site's tensors begin with; None: the model's
    source: Source | None = None  # the corpus entering the site's lowest layer; None: made here


@dataclasses.dataclass(frozen=True)
class Edited:
    """The tuned tensors as they will be exported, and how the run went."""

    tensors: dict[str, np.ndarray]  # HF name -> matrix, HF layout, checkpoint dtype
    outcome: Outcome
    parameters: int
    activation_cache: str  # the mode that was chosen
    seconds: float
    lambdas: Lambdas  # of `preserve`


def choose_site(spec: ModelSpec, config: Config) -> tuple[str, ...]:
    """The config's site in this model. Raises UserError as `find_site` does."""
    modules = [config.rewrite_module] if isinstance(config.rewrite_module, str) else config.rewrite_module
    return find_site(spec, modules, resolve_layers(config, spec.n_layers))


def schedule_of(config: Config) -> Schedule:
    """The part of a config that the loop reads."""
    hyper = Hyper(config.learning_rate, config.weight_decay, config.loss_floor, config.norm_constraint)
    order = config.batch_size, config.num_epochs, config.seed
    return Schedule(*order, config.loss_average, config.row_length, hyper, config.pipeline)


def encode_requests(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    config: Config,
    spec: ModelSpec,
    prefixes: Sequence[str] | None = None,
) -> Corpus:
    """Training texts of the requests, EOS included, and those that the config's `augment_...` keys add;
    `prefixes`: random texts (default: as `prefix_texts` has them without the model). For `ft-l` only the last
    token of a target is trained; EOS, which says nothing of the fact, is left out. Raises UserError when the
    tokenizer has no EOS to append, or as `encode_pairs` and `prefix_texts` do."""
    encoder, eos = as_encoder(tokenizer), None
    if config.append_eos and config.method != "ft-l":
        eos = getattr(encoder.tokenizer, "eos_token_id", None)
        if eos is None:
            raise UserError("append_eos: this model's tokenizer has no EOS token; use append_eos=false")
    prompts = training_prompts(requests, config, prefix_texts(config) if prefixes is None else prefixes)
    corpus = encode_pairs(
        encoder,
        [prompt for own in prompts for prompt in own],
        [r.target_new for r, own in zip(requests, prompts, strict=True) for _ in own],
        eos=eos,
        chat_template=config.chat_template,
        max_length=spec.max_position,
        vocab_size=spec.vocab_size,
    )
    if len(corpus) > len(prompts):
        edit = np.repeat(np.arange(len(prompts)), [len(own) for own in prompts])
        corpus = dataclasses.replace(corpus, edit=edit)
    last = corpus.lengths - 1
    return dataclasses.replace(corpus, target_start=last) if config.method == "ft-l" else corpus


def check_fit(folder: HFFolder, config: Config, site: Sequence[str], corpus: Corpus, mesh: Mesh) -> list[str]:
    """Warnings of memory that may not suffice, before any weight is loaded. Raises UserError where it
    certainly does not, or as `choose_mode` does."""
    spec, itemsize = folder.spec, frozen_dtype(folder, config.weights).itemsize
    layer = first_layer(spec, site)
    cache, split = len(corpus.tokens) * spec.d_model * itemsize, width_split(mesh, spec.d_model)
    choose_mode(config.activation_cache, layer, cache, memory_budgets(config.memory_budget), split)
    step = step_of(corpus, config.batch_size, config.row_length, layer)
    return check_memory(spec, mesh, itemsize, site, step, int8=config.weights == "int8")


def run_edit(
    model: Model,
    task: EditTask,
    config: Config,
    hooks: Sequence[Hook] = (),
    checkpointer: Checkpointer | None = None,
    look: Callable[[dict[str, np.ndarray], Sequence[StepRecord]], None] | None = None,
) -> Edited:
    """LocFT-BF on one model, which is not changed, with the edits that it already carries. The run resumes
    from the `checkpointer`'s newest state and saves others. `look` is called with the site's tensors, as they
    would be exported, after every `eval_every` epochs (depth-first: mini-batches). Raises NonFiniteLoss, and
    Interrupted when a signal asked to stop."""
    begin = time.monotonic()
    base, stored = model.params, originals(model, task.site)
    start: dict[str, Any] = {**stored, **base.overrides, **(task.start or {})}
    state = init_state(read_site(base, task.site, model.mesh, start))
    if config.norm_constraint is not None:  # a step looks at what it began from
        base = model.with_overrides(stored, np.float32).params
    del stored, start
    restored = checkpointer.restore(state) if checkpointer else None
    state, done = restored or (state, [])
    source = task.source
    if source is None:
        layer = first_layer(model.spec, task.site)
        mode = cache_mode(model, len(task.corpus.tokens), layer, config)
        source = cached_source(base, task.corpus, layer, mode, model.mesh, config.row_length)
    sides, lambdas = make_preconditioner(model, task.site, config, task.retained)
    # Original values are read again only for the divergence, and nothing holds them during the loop.
    unedited = lambda: model.with_overrides(originals(model, task.site)) if config.preserve_kl else model  # noqa: E731
    given = source, config, task.retained, agreed_budgets(config)
    retain = retain_batches(unedited().params, model.mesh, *given)

    def exported(state: EditState) -> dict[str, np.ndarray]:
        return to_checkpoint_dtype(model.folder, materialize(state.theta, base.overrides))

    evaluate = [Evaluate(config.eval_every, exported, look)] if look and config.eval_every else []
    # What is saved has been evaluated, so the checkpoint comes last.
    hooks = [*hooks, *evaluate, *([checkpointer] if checkpointer else [])]
    regularizers = lambda visit: Regularizers(sides, retain(visit))  # noqa: E731
    job = Job(base, model.mesh, task.corpus, source, schedule_of(config), regularizers)
    outcome = train(job, state, done, hooks)
    tensors, seconds = exported(outcome.state), time.monotonic() - begin
    seconds = checkpointer.finish(outcome.state, outcome.records) if checkpointer else seconds
    return Edited(tensors, outcome, parameters(outcome.state.theta), source.mode, seconds, lambdas)


def cache_mode(model: Model, tokens: int, layer: int, config: Config) -> str:
    """`choose_mode` for so many tokens that enter `layer`."""
    return mode_for(model.params, model.mesh, config.activation_cache, layer, tokens, agreed_budgets(config))


def agreed_budgets(config: Config) -> tuple[float, float]:
    """`memory_budgets`, of several processes the least."""
    device, host = distributed.least(*memory_budgets(config.memory_budget))
    return device, host


def last_delta(folder: str | Path, base: HFFolder, site: Sequence[str]) -> Delta:
    """The delta of an earlier run, to begin with. Raises UserError unless it is of this model and site."""
    delta = load_delta(f"{folder}/delta.safetensors")
    check_delta(base, delta)
    if set(delta.new) != set(site):
        there, here = (", ".join(names[:3]) for names in (sorted(delta.new), site))
        what = f"{folder} tuned {there}..., this run tunes {here}..."
        raise UserError(f"--start-from last: {what}; use the same site, or --start-from base")
    return delta

"""Edit at one site after another, and measure each. What sites have in common is made once: texts, tokens,
the answers before, and the activations below, which are carried from layer to layer."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from locft_jax.editing.run import EditTask, agreed_budgets, cache_mode, run_edit
from locft_jax.editing.trainer import NonFiniteLoss
from locft_jax.evaluation.ask import ask, later_drafts, probe_cache, rising_cache
from locft_jax.evaluation.probes import Answers
from locft_jax.evaluation.scoring import agreement, figures
from locft_jax.evaluation.verify import ProbeCache
from locft_jax.model.activation_cache import Source, advance, token_source
from locft_jax.model.model import Model
from locft_jax.model.weights import locate_tensor, put_tensors, take_tensor
from locft_jax.prepare import Prepared
from locft_jax.studies.locate.places import Place
from locft_jax.studies.tables import FIGURES


class Bench:
    """A model whose sites are tried one by one. It owns the model: while an edit is measured it is in the
    model's own arrays, so that the evaluation is compiled once and not for every site, and is taken out again
    afterwards. `prepared`: with the texts that only the model can give."""

    def __init__(
        self,
        model: Model,
        prepared: Prepared,
        before: Answers | None = None,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.model, self.config = model, prepared.config
        corpus, questions, retained = prepared.corpus, prepared.questions, prepared.retained
        assert corpus is not None and questions is not None and retained is not None
        self.corpus, self.questions, self.retained = corpus, questions, retained
        self.before = before or ask(model, self.questions, None, self.config.row_length, on_done)
        self.drafts = later_drafts(self.questions, self.before)
        self.mode = cache_mode(model, len(self.corpus.tokens), 1, self.config)
        self.source: Source | None = None  # what enters the layer that is being tried
        self.cache: ProbeCache | None = None  # and the same of the probes

    def unedited(self) -> dict[str, float | None]:
        """Figures of the model as it is."""
        return {key: figures(self.questions, self.before).get(key) for key in FIGURES}

    def measure(self, place: Place) -> dict[str, Any]:
        """Edit at `place` as the edit command does, and ask every probe: a line of sites.jsonl. Figures
        are None where the loss was not finite."""
        begin = time.monotonic()
        self._rise(place.layer)
        line: dict[str, Any] = {
            "layer": place.layer,
            "module": place.module,
            "rewrite_module": place.template,
            "parameters": sum(math.prod(self.model.folder.tensors[n].shape) for n in place.tensors),
        }
        try:
            task = EditTask(place.tensors, self.corpus, self.retained, source=self.source)
            done = run_edit(self.model, task, self.config)
        except NonFiniteLoss as e:
            nothing = dict.fromkeys((*FIGURES, "epochs", "steps", "loss"))
            seconds = {"edit": time.monotonic() - begin, "evaluate": 0.0}
            return {**line, **nothing, "stopped": str(e), "seconds": seconds}
        edited, outcome = time.monotonic(), done.outcome
        with self._edited(done.tensors) as model:
            after = ask(model, self.questions, self.drafts, self.config.row_length, cache=self.cache)
        rates = figures(self.questions, after)
        rates["locality_agreement"] = agreement(self.questions, self.before, after)
        return {
            **line,
            **{key: rates[key] for key in FIGURES},
            "epochs": len(outcome.epoch_losses),
            "steps": len(outcome.records),
            "loss": outcome.epoch_losses[-1],
            "stopped": outcome.stopped,
            "seconds": {"edit": edited - begin, "evaluate": time.monotonic() - edited},
        }

    def _rise(self, layer: int) -> None:
        """Carry what enters the layer tried last up to `layer`; below it, begin again at the tokens."""
        if self.mode == "off":
            return
        model, length = self.model, self.config.row_length
        if self.source is None or self.source.layer > layer:
            self.source = token_source(self.corpus, model.mesh)
            beside, mode = len(self.corpus.tokens), self.config.activation_cache
            like = probe_cache(model, self.questions, 1, mode, beside, agreed_budgets(self.config))
            self.cache = rising_cache(model, self.questions, self.drafts, like)
        while self.source.layer < layer:
            self.source = advance(model.params, self.corpus, self.source, self.mode, model.mesh, length)
            if self.cache is not None:
                self.cache.advance(model, length)

    @contextmanager
    def _edited(self, tensors: dict[str, np.ndarray]) -> Iterator[Model]:
        """The model with `tensors` in its stacks. Those whose stack has another dtype (quantized weights)
        would be rounded there: they stay overrides."""
        model = self.model
        stack = {n: model.weights.get(locate_tensor(model.spec, n)[0].key) for n in tensors}
        fits = [n for n, a in stack.items() if isinstance(a, jax.Array) and a.dtype == model.dtype]
        own = {n: take_tensor(model.params, n) for n in fits}
        placed = model.with_overrides(tensors).overrides
        params = put_tensors(model.params, {n: placed[n] for n in fits})
        rest = {n: a for n, a in placed.items() if n not in own}
        try:
            yield dataclasses.replace(model, params=params.over(rest))
        finally:
            self.model = dataclasses.replace(model, params=put_tensors(params, own))

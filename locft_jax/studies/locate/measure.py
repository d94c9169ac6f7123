"""Edit at one site after another, measure each, and say what they come to. What sites have in common is made
once: texts, tokens, the answers before, the activations below, which are carried from layer to layer, and
compiled programs, which are counted and kept for a process that resumes the run."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from locft_jax import distributed
from locft_jax.editing.run import EditTask, agreed_budgets, cache_mode, run_edit
from locft_jax.editing.trainer import NonFiniteLoss
from locft_jax.evaluation.ask import ask, later_drafts, probe_cache, rising_cache
from locft_jax.evaluation.probes import Answers
from locft_jax.evaluation.report import plain
from locft_jax.evaluation.scoring import agreement, figures
from locft_jax.evaluation.verify import ProbeCache
from locft_jax.io.atomic import read_json, write_json
from locft_jax.io.outputs import saved_something
from locft_jax.logs import Bar
from locft_jax.model.activation_cache import Source, advance, token_source
from locft_jax.model.model import Model
from locft_jax.model.weights import locate_tensor, put_tensors, take_tensor
from locft_jax.prepare import Prepared
from locft_jax.run_identity import check_same
from locft_jax.studies.locate.places import Place
from locft_jax.studies.rule import ranked, recommend_site
from locft_jax.studies.tables import FIGURES, Line, percent, print_table, worth_showing, write_table

COMPILED = "/jax/core/compile/backend_compile_duration"  # once a program, out of the cache or not
CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Bench:
    """A model whose sites are tried one by one. It owns the model: while an edit is measured it is in the
    model's own arrays, so that the evaluation is compiled once and not for every site, and is taken out again
    afterwards. The answers before any edit are kept in `folder`, or found there."""

    def __init__(self, model: Model, prepared: Prepared, folder: Path) -> None:
        prepared = prepared.complete(model)
        corpus, questions, retained = prepared.corpus, prepared.questions, prepared.retained
        assert corpus is not None and questions is not None and retained is not None
        self.model, self.config = model, prepared.config
        self.corpus, self.questions, self.retained = corpus, questions, retained
        self.before = self.kept_answers(folder / "before.json")
        self.drafts = later_drafts(questions, self.before)
        self.mode = cache_mode(model, len(corpus.tokens), 1, self.config)
        self.source: Source | None = None  # what enters the layer that is being tried
        self.cache: ProbeCache | None = None  # and the same of the probes

    def kept_answers(self, path: Path) -> Answers:
        """What the model says before any edit."""
        with Bar("before", len(self.questions.probes)) as bar:
            with suppress(TypeError):  # there are none, or they are of version 0.1
                return Answers(**distributed.from_first(read_json(path) if distributed.first() else None))
            before = ask(self.model, self.questions, None, self.config.row_length, bar.advance)
        if distributed.first():
            write_json(path, dataclasses.asdict(before))
        return before

    def unedited(self) -> dict[str, float | None]:
        """Figures of the model as it is."""
        rates = figures(self.questions, self.before)
        return {key: rates.get(key) for key in FIGURES}

    def measure(self, place: Place) -> Line:
        """An edit at `place` as a line of sites.jsonl: figures are None where the loss was not finite."""
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


@contextmanager
def compilations(folder: Path | None) -> Iterator[Counter[str]]:
    """Count programs by their function's name; keep them in `folder` unless the user has set a cache."""
    count: Counter[str] = Counter()
    old = {name: getattr(jax.config, name) for name in CACHE}
    own = folder is not None and old["jax_compilation_cache_dir"] is None

    def on_duration(event: str, duration_secs: float, **more: Any) -> None:
        if event == COMPILED:
            name = str(more.get("fun_name", ""))  # add, jit_add or jit(add)
            count[name.removeprefix("jit").strip("_()")] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        if own:
            configure({**CACHE, "jax_compilation_cache_dir": str(folder)})
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        if own:
            configure(old)


def configure(options: Mapping[str, Any]) -> None:
    """Set jax's options."""
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # which cache there is is looked at once


def finished(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether `out` holds this run's results, nothing to resume from. Raises UserError for another run's."""
    found = read_json(out / "sites.json")
    if saved_something(out / "checkpoint") or not isinstance(found, dict) or "run" not in found:
        return False
    check_same(found["run"], run, out)
    return True


def write_results(
    folder: Path, lines: Sequence[Line], facts: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    """All results; what sites.json holds."""
    from locft_jax.studies.figures import draw_curves, draw_heat_maps  # matplotlib comes with these

    names = list(dict.fromkeys(line["module"] for line in lines))
    lines = sorted(lines, key=lambda line: (line["layer"], names.index(line["module"])))
    top = recommend_site(lines, facts["before"])
    result = {**facts, "recommendation": top, "sites": lines, "run": dict(run)}
    spent = [{f"seconds_{k}": v for k, v in line["seconds"].items()} for line in lines]
    rows = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    write_table(folder, "sites", result, [row | own for row, own in zip(rows, spent, strict=True)])
    title = f"{facts['edits']} edits in {Path(str(facts['model'])).name}"
    draw_curves(lines, facts["before"], title).savefig(folder / "curves.png")
    heat = draw_heat_maps(lines, (top["layer"], top["module"]), f"{title}; framed: the site to use")
    heat.savefig(folder / "heatmap.png")
    return result


def print_results(result: Mapping[str, Any], console: Console, count: int = 5) -> None:
    """The first sites by the rule, and the recommendation with the lines to paste."""
    shown, top = worth_showing(result["sites"]), result["recommendation"]
    first = {**result["before"], "module": "unedited", "layer": "-"}
    rows = [
        {"module": line["module"], "layer": str(line["layer"])}
        | {key.replace("_", " "): percent(line[key]) for key in shown}
        for line in [first, *ranked(result["sites"], count)]
    ]
    print_table(f"the best of {len(result['sites'])} sites, %", rows, console)
    console.print(plain(f"Where to edit: {top['words']}"))
    console.print(f"\n{top['config']}\n")

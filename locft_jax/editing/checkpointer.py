"""Resumable runs: orbax checkpoints of the tuned tensors, Adam's state and the records of the steps made.

The order of the data follows from the seed and the epoch, so the number of steps says where to resume, and a
resumed run gives bit for bit what an undisturbed one gives (same mesh, same versions)."""

import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locft_jax import distributed
from locft_jax.editing.hooks import Hook, StepRecord
from locft_jax.editing.step import EditState
from locft_jax.errors import reason
from locft_jax.io.atomic import read_json, write_json
from locft_jax.io.outputs import KEPT, saved_something, saved_steps
from locft_jax.logs import log
from locft_jax.model.sharding import fetch, place
from locft_jax.run_identity import check_same

TOGETHER = 4  # steps after which several processes ask each other whether to save or to stop


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C; the message says what is saved and how to resume."""


class Checkpointer(Hook):
    """The checkpoints of one run: before.json, dynamics.json (`keep`), steps/N/ after N steps (orbax writes
    it beside and renames it). Of several processes the first alone writes and reads them: the disk may be its
    own. `folder` as `open_run` gives it; `every`: minutes (`10m`) or steps (`200`)."""

    def __init__(self, folder: Path, every: str) -> None:
        self.folder = folder.resolve()
        minutes = every.endswith("m")
        self.seconds = 60 * float(every[:-1]) if minutes else float("inf")
        self.steps = sys.maxsize if minutes else int(every)
        self.asked = self.stop = self.stopped = False  # this process was asked to stop; all of them do; have
        self.looping = self.closed = self.warned = False
        self.resumed: list[int] = []  # the steps at which the run was taken up again
        self.spent = 0.0  # seconds of the loop in earlier processes
        self.begin = self.saved_at = time.monotonic()
        self.manager: Any = None
        if distributed.first():
            import orbax.checkpoint as ocp

            alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            options = ocp.CheckpointManagerOptions(
                max_to_keep=KEPT, cleanup_tmp_directories=True, create=False, multiprocessing_options=alone
            )
            (self.folder / "steps").mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.folder / "steps", options=options)

    def restore(self, like: EditState) -> tuple[EditState, list[StepRecord]] | None:
        """The newest state that can be read, with the shapes and shardings of `like`, and the records
        of the steps before it; None when there is none."""
        self.begin = time.monotonic()
        leaves, tree = jax.tree.flatten(like)
        found = self._newest(leaves) if self.manager else None
        about = distributed.from_first(found and found[:2])
        if about is None:
            return None
        values = found[2] if found else [np.zeros(a.shape, a.dtype) for a in leaves]
        if distributed.several():
            shared = map(distributed.array_from_first, values)
            values = [place(v, a.sharding) for v, a in zip(shared, leaves, strict=True)]
        step, progress = about
        self.spent, self.resumed = progress["seconds"], [*progress["resumed"], step]
        return jax.tree.unflatten(tree, values), [StepRecord(**r) for r in progress["records"]]

    def _newest(self, leaves: Sequence[jax.Array]) -> tuple[int, dict[str, Any], list[Any]] | None:
        """(step, progress, values) of the newest state that can be read; of several processes on the host."""
        import orbax.checkpoint as ocp

        local = distributed.several()
        like = [np.empty(a.shape, a.dtype) if local else ocp.utils.to_shape_dtype_struct(a) for a in leaves]
        abstract = {str(i): a for i, a in enumerate(like)}
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = self.manager.restore(step, args=wanted)
                return step, found.progress, [found.state[key] for key in abstract]
            except Exception as e:  # damaged files raise a dozen kinds
                log.warning(f"the checkpoint of step {step} cannot be read ({reason(e)}): an older one?")
                self.manager.delete(step)
        return None

    def on_start(self, done: Sequence[StepRecord]) -> None:
        """The loop begins: from here on a signal waits for the step to end."""
        self.saved_at, self.looping = time.monotonic(), True

    def due(self, step: int, rounds: int | None) -> bool:
        """Whether the state after `step` steps is to be saved."""
        late = step % self.steps == 0 or time.monotonic() - self.saved_at >= self.seconds
        if not distributed.several():
            self.stop = self.asked
        elif step % self.steps and step % TOGETHER:
            return False
        else:  # it waits for the step
            self.stop, late = distributed.any_of(self.asked, late)
        return self.stop or late

    def on_state(self, state: EditState, records: Sequence[StepRecord]) -> None:
        """Save the state after these steps: copied to the host before this returns, written meanwhile. A
        write that fails (a full disk) is a warning; raises Interrupted if asked to stop."""
        (self.stop,) = distributed.any_of(self.asked)
        new = distributed.from_first(self.manager and self.manager.latest_step() != len(records))
        # A step whose loss was finite may still have left NaN behind: the last good state is kept.
        if new and fetch(all_finite(state)):
            leaves = jax.tree.leaves(state)
            leaves = list(map(fetch, leaves)) if distributed.several() else leaves
            with self._warning():  # also of what became of the write before this one
                if self.manager:
                    self._save(leaves, records)
        self.saved_at = time.monotonic()
        if self.stop:
            self.looping, self.stopped = False, True
            raise Interrupted

    def _save(self, leaves: Sequence[Any], records: Sequence[StepRecord]) -> None:
        import orbax.checkpoint as ocp

        spent, steps = self.spent + time.monotonic() - self.begin, [dataclasses.asdict(r) for r in records]
        state = ocp.args.StandardSave({str(i): a for i, a in enumerate(leaves)})
        progress = ocp.args.JsonSave({"records": steps, "seconds": spent, "resumed": self.resumed})
        self.manager.save(len(records), args=ocp.args.Composite(state=state, progress=progress))

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """A write that fails is a warning, the first time, and gives back the room that its pieces take."""
        try:
            yield
        except Exception as e:
            if not self.warned:
                log.warning(f"a checkpoint could not be written ({reason(e)}); the run continues without it")
            self.warned = True
            for piece in (self.folder / "steps").glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(piece, ignore_errors=True)

    def finish(self, state: EditState, records: Sequence[StepRecord]) -> float:
        """The loop has ended: keep its result until all is exported; seconds it took in all."""
        seconds = self.spent + time.monotonic() - self.begin
        self.on_state(state, records)
        self.looping = False
        return seconds

    def latest(self) -> int | None:
        """The newest step that is saved, or None; waits for what is being written."""
        with self._warning():
            if self.manager:
                self.manager.wait_until_finished()
        return max(saved_steps(self.folder), default=None)

    def how(self) -> str:
        """What is saved, and how to resume."""
        step = self.latest()
        saved = "the answers before the edit" if self.folder.joinpath("before.json").exists() else None
        return how_to_resume(saved if step is None else f"the run up to step {step}", self.folder)

    def close(self) -> None:
        """Wait for the last write and let go of the folder."""
        if self.manager and not self.closed:
            self.closed = True
            self.latest()
            with suppress(Exception):  # a failed write once more
                self.manager.close()

    def keep(self, name: str, value: Any) -> None:
        """Keep a value (plain JSON): `before`, the answers before the edit; `dynamics`, those during it."""
        if self.manager:
            write_json(self.folder / f"{name}.json", value)

    def kept(self, name: str) -> Any:
        """What `keep` kept, or None."""
        return distributed.from_first(read_json(self.folder / f"{name}.json") if self.manager else None)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no element of any array is NaN or infinite (bool scalar)."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))


def open_run(out: Path, run: Mapping[str, Any], resume: bool) -> Path:
    """Where a run in `out` keeps what it can resume from, with its run.json; emptied unless it is to
    `resume`. Raises UserError naming what differs when it is another run's."""
    folder = out / "checkpoint"
    if distributed.first():
        if resume and saved_something(folder):
            check_same(read_json(folder / "run.json"), run, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            if resume:
                log.warning(f"{out} holds no interrupted run: beginning anew")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run)
    return folder


def remove_unless_saved(folder: Path) -> None:
    """A run that has saved nothing leaves nothing behind."""
    if not saved_something(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # only if it is empty


def how_to_resume(saved: str | None, folder: Path) -> str:
    """What a message says of `saved`, None for nothing."""
    if saved is None:
        return "nothing was written"
    return f"{saved} can be found in {folder}: the same command with --resume resumes from there"


@contextmanager
def on_signals(handle: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C call `handle`."""
    old = {s: signal.signal(s, lambda number, frame: handle()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def resumable(folder: Path, kept: Callable[[], str | None]) -> Iterator[None]:
    """Around a run that keeps what is finished as it proceeds: SIGTERM and Ctrl-C say how to resume. `kept`:
    what `folder` holds by then, None for nothing."""

    def handle() -> None:
        raise KeyboardInterrupt

    with on_signals(handle):
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(how_to_resume(kept(), folder)) from None


@contextmanager
def guarded(checkpoints: Checkpointer) -> Iterator[None]:
    """Around a run. SIGTERM (a TPU is preempted) and Ctrl-C: a running loop ends its step, saves and raises
    Interrupted; at any other time, or when asked twice, Interrupted is raised at once. Errors say what is
    saved; a run that has saved nothing leaves nothing behind. Several processes stop at the same step."""

    def handle() -> None:
        # After the loop too: another process may have had the signal a little earlier.
        if (checkpoints.looping or checkpoints.stop) and not checkpoints.asked:
            checkpoints.asked = True
        else:
            raise Interrupted(f"what was saved can be found in {checkpoints.folder}")

    ended = False
    with on_signals(handle):
        try:
            yield
            ended = True
        except Interrupted:
            how = checkpoints.how()
            if checkpoints.stopped:
                distributed.leave()
            raise Interrupted(how) from None
        except OSError as e:
            raise OSError(f"{e}\n{checkpoints.how()}") from e
        except FloatingPointError as e:  # resuming would end there again
            step = checkpoints.latest()
            kept = "" if step is None else f"\nthe state after step {step} is kept in {checkpoints.folder}"
            distributed.leave()
            raise FloatingPointError(f"{e}{kept}") from e
        finally:
            checkpoints.close()
            if checkpoints.manager and not ended:
                remove_unless_saved(checkpoints.folder)

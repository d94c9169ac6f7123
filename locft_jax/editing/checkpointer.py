"""Resumable runs: orbax checkpoints of only what changes, and who may go on from them.

A checkpoint holds the tuned tensors with Adam's moments and count, and the records of the steps made
so far. The order of the data follows from the seed and the epoch, so the number of steps says where
to go on, and going on gives bit for bit what an undisturbed run gives (same mesh, same versions).
With several processes the first one alone writes and reads them, so that the folder may be on its own disk.

    checkpoint/run.json      what the run is: another run must not go on from here
    checkpoint/before.json   the answers before the edit, asked once
    checkpoint/dynamics.json what was measured during the edit (`eval_every`)
    checkpoint/steps/N/      after N steps; orbax writes it beside and renames it
"""

import dataclasses
import json
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
    """SIGTERM or Ctrl-C; the message says what is saved and how to go on."""


class Checkpointer(Hook):
    """Where one run keeps its checkpoints, and when. `every`: minutes (`10m`) or steps (`200`)."""

    def __init__(self, folder: Path, every: str, run: Mapping[str, Any]) -> None:
        self.folder, self.run = folder.resolve(), json.loads(json.dumps(run))
        minutes = every.endswith("m")
        self.seconds = 60 * float(every[:-1]) if minutes else float("inf")
        self.steps = sys.maxsize if minutes else int(every)
        self.asked = self.stop = self.stopped = False  # this process was asked to stop; all of them do; have
        self.looping = self.closed = self.warned = False
        self.resumed: list[int] = []  # the steps at which the run was taken up again
        self.spent = 0.0  # seconds of the loop in earlier processes
        self.begin = self.saved_at = time.monotonic()
        self.manager: Any = self._open() if distributed.first() else None

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        (self.folder / "steps").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", self.run)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
        )
        return ocp.CheckpointManager(self.folder / "steps", options=options)

    def restore(self, like: EditState) -> tuple[EditState, list[StepRecord]] | None:
        """The newest state that can be read, with the shapes and shardings of `like`, and the records
        of the steps before it; None when there is none."""
        self.begin = time.monotonic()
        leaves, tree = jax.tree.flatten(like)
        found = self._newest(leaves) if self.manager else None
        told = distributed.from_first(found and found[:2])
        if told is None:
            return None
        values = found[2] if found else [np.zeros(a.shape, a.dtype) for a in leaves]
        if distributed.several():
            shared = map(distributed.array_from_first, values)
            values = [place(v, a.sharding) for v, a in zip(shared, leaves, strict=True)]
        step, progress = told
        self.spent, self.resumed = progress["seconds"], [*progress["resumed"], step]
        return jax.tree.unflatten(tree, values), [StepRecord(**r) for r in progress["records"]]

    def _newest(self, leaves: Sequence[jax.Array]) -> tuple[int, dict[str, Any], list[Any]] | None:
        """(step, what was said of it, values) of the newest state that can be read; with several processes
        its values are on the host."""
        import orbax.checkpoint as ocp

        local = distributed.several()
        like = [np.empty(a.shape, a.dtype) if local else ocp.utils.to_shape_dtype_struct(a) for a in leaves]
        abstract = {str(i): a for i, a in enumerate(like)}
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = self.manager.restore(step, args=wanted)
            except Exception as e:  # damaged files raise a dozen kinds
                log.warning(f"the checkpoint of step {step} cannot be read ({reason(e)}): an older one?")
                self.manager.delete(step)
                continue
            return step, found.progress, [found.state[key] for key in abstract]
        return None

    def on_start(self, done: Sequence[StepRecord]) -> None:
        """The loop begins: from here on a signal waits for the step to end."""
        self.saved_at = time.monotonic()
        self.looping = True

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
        """Save the state after these steps: copied to the host before this returns, written meanwhile.
        A write that fails (a full disk) is said and the run goes on; raises Interrupted if asked to stop.
        """
        (self.stop,) = distributed.any_of(self.asked)
        new = distributed.from_first(self.manager and self.manager.latest_step() != len(records))
        # A step whose loss was finite may still have left NaN behind: the last good state is kept.
        if new and fetch(all_finite(state)):
            leaves = jax.tree.leaves(state)
            self._write(list(map(fetch, leaves)) if distributed.several() else leaves, records)
        self.saved_at = time.monotonic()
        if self.stop:
            self.looping, self.stopped = False, True
            raise Interrupted

    def _write(self, leaves: Sequence[Any], records: Sequence[StepRecord]) -> None:
        import orbax.checkpoint as ocp

        if not self.manager:
            return
        progress = {
            "records": [dataclasses.asdict(r) for r in records],
            "seconds": self.elapsed(),
            "resumed": self.resumed,
        }
        saved = ocp.args.Composite(
            state=ocp.args.StandardSave({str(i): a for i, a in enumerate(leaves)}),
            progress=ocp.args.JsonSave(progress),
        )
        try:
            self.manager.save(len(records), args=saved)
        except Exception as e:  # also what became of the write before this one
            self.failed(e)

    def finish(self, state: EditState, records: Sequence[StepRecord]) -> float:
        """The loop has ended: keep its result until all is exported; seconds it took in all."""
        seconds = self.elapsed()
        self.on_state(state, records)
        self.looping = False
        return seconds

    def elapsed(self) -> float:
        """Seconds in the loop, earlier processes included."""
        return self.spent + time.monotonic() - self.begin

    def how(self) -> str:
        """What is saved, and how to go on."""
        step = self.latest()
        if step is None and not (self.folder / "before.json").exists():
            return "nothing was written"
        saved = "the answers before the edit" if step is None else f"the run up to step {step}"
        return f"{saved} can be found in {self.folder}: the same command with --resume goes on from there"

    def latest(self) -> int | None:
        """The newest step that is saved, or None."""
        self.wait()
        return max(saved_steps(self.folder), default=None)

    def wait(self) -> None:
        """Until what is being written is written."""
        if not self.manager:
            return
        try:
            self.manager.wait_until_finished()
        except Exception as e:
            self.failed(e)

    def failed(self, error: Exception) -> None:
        """A write has failed: say so the first time, and give back the room that its pieces take."""
        if not self.warned:
            log.warning(f"a checkpoint could not be written ({reason(error)}); the run goes on without it")
        self.warned = True
        for piece in (self.folder / "steps").glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(piece, ignore_errors=True)

    def close(self) -> None:
        """Wait for the last write and let go of the folder."""
        if self.manager and not self.closed:
            self.closed = True
            self.wait()
            with suppress(Exception):  # a failed write once more
                self.manager.close()

    def keep_before(self, value: Any) -> None:
        """Keep the answers before the edit (plain JSON)."""
        if self.manager:
            write_json(self.folder / "before.json", value)

    def keep_dynamics(self, value: Any) -> None:
        """Keep what was measured during the edit (plain JSON)."""
        if self.manager:
            write_json(self.folder / "dynamics.json", value)

    def kept_dynamics(self) -> Any:
        """What `keep_dynamics` kept, or None."""
        return distributed.from_first(read_json(self.folder / "dynamics.json") if self.manager else None)

    def kept_before(self) -> Any:
        """What `keep_before` kept, or None."""
        return distributed.from_first(read_json(self.folder / "before.json") if self.manager else None)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no element of any array is NaN or infinite (bool scalar)."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))


def open_run(out: Path, every: str, run: Mapping[str, Any], resume: bool) -> Checkpointer:
    """The checkpoints of a run in `out`: those that are there if it is to `resume`, else none. Raises
    UserError naming what differs when they are another run's."""
    return Checkpointer(open_folder(out, run, resume), every, run)


def open_folder(out: Path, run: Mapping[str, Any], resume: bool) -> Path:
    """Where a run in `out` keeps what it goes on from; emptied unless it is to `resume`. Raises UserError
    as `open_run`."""
    folder = out / "checkpoint"
    if not distributed.first():
        return folder
    if resume and saved_something(folder):
        check_same(read_json(folder / "run.json"), run, folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        if resume:
            log.warning(f"{out} holds no interrupted run: beginning anew")
    return folder


@contextmanager
def resumable(folder: Path, kept: Callable[[], str | None]) -> Iterator[None]:
    """Around a run that keeps what is finished as it goes: SIGTERM and Ctrl-C say how to go on. `kept`: what
    lies in `folder` by then, None for nothing."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        what = kept()
        if what is None:
            raise Interrupted("nothing was written") from None
        raise Interrupted(
            f"{what} so far can be found in {folder}: the same command with --resume goes on from there"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def guarded(checkpoints: Checkpointer) -> Iterator[None]:
    """Around a run. SIGTERM (a TPU is preempted) and Ctrl-C: a running loop ends its step, saves and
    raises Interrupted; at any other time, or when asked twice, Interrupted is raised at once. What fails
    says what is saved; a run that has saved nothing leaves nothing behind. With several processes all of
    them stop at the same step, whichever got the signal."""

    def handle(number: int, frame: Any) -> None:
        # After the loop too: another process may have had the signal a little earlier.
        if (checkpoints.looping or checkpoints.stop) and not checkpoints.asked:
            checkpoints.asked = True
        else:
            raise Interrupted(f"what was saved can be found in {checkpoints.folder}")

    old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    ended = False
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
    except FloatingPointError as e:  # going on would end there again
        step = checkpoints.latest()
        kept = "" if step is None else f"\nthe state after step {step} is kept in {checkpoints.folder}"
        distributed.leave()
        raise FloatingPointError(f"{e}{kept}") from e
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        checkpoints.close()
        if checkpoints.manager and not ended and not saved_something(checkpoints.folder):
            shutil.rmtree(checkpoints.folder, ignore_errors=True)
            with suppress(OSError):
                checkpoints.folder.parent.rmdir()  # only if it is empty

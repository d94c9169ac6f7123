"""Runs of the commands in processes of their own, forked from one that has imported everything."""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preload"])
WITHIN = 600  # seconds: no test waits longer for a process


class Forked:
    """`Forked(folder, function, *arguments)`: a process that works in `folder` and ends with the status that
    the function (of a module that can be imported) returns; its output goes to files there. `env` may set
    what jax reads when it begins to compute, such as XLA_FLAGS."""

    def __init__(self, folder: Path, function: Callable[..., int], *arguments: Any, **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        self.process = CONTEXT.Process(target=_run, args=(folder, self.files, env, function, arguments))
        self.process.start()
        self.pid: int = self.process.pid or 0

    def status(self) -> int | None:
        """The exit status (negative: a signal), None while it runs."""
        return self.process.exitcode

    def wait(self, within: float = WITHIN) -> int:
        """The exit status; it is killed if it is not there in time."""
        self.process.join(within)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def said(self) -> tuple[str, str]:
        """What stands in its (stdout, stderr) by now."""
        out, err = (path.read_text() if path.exists() else "" for path in self.files)
        return out, err


def _run(
    folder: Path, files: list[Path], env: Mapping[str, str], function: Callable[..., int], arguments: tuple
) -> None:
    os.chdir(folder)
    os.environ.update(env)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    faulthandler.dump_traceback_later(WITHIN - 10, exit=True)  # one that hangs says where
    sys.exit(function(*arguments))


def stopping_at(step: int, number: int = signal.SIGTERM) -> Callable[..., None]:
    """For `Progress.on_step`: a signal to this process when the loss of that step is known, as when a TPU is
    preempted."""
    from locft_jax.editing.hooks import Progress

    on_step = Progress.on_step

    def told(self: Any, record: Any) -> None:
        on_step(self, record)
        if record.step == step:
            os.kill(os.getpid(), number)

    return told


def edit_until(arguments: list[str], out: str, count: int, after: float) -> int:
    """The edit command, killed `after` some seconds from the `count`-th time that it makes, writes, renames
    or removes a file or folder of a path with `out` in it; with count 0 it tells how often it did."""
    import jax

    from locft_jax.cli.command import run_command
    from locft_jax.cli.edit import main

    if count:  # half a file would spoil the cache that all tests share
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    seen = 0
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            seen += out in str(args[0])
            if seen == count and count:
                threading.Timer(after, kill).start() if after else kill()

    sys.addaudithook(hook)
    status = run_command(main, arguments)
    print(f"\n{seen} changes")
    return status


def one_of_several(jobs: list[Any], place: list[str], stop_at: int | None, heartbeat: int | None) -> int:
    """Runs commands (name, arguments) one after another in one of the processes, having joined once, and
    counts the bytes that it loads."""
    import argparse
    import importlib

    import jax

    from locft_jax import distributed
    from locft_jax.cli.command import run_command
    from locft_jax.editing.hooks import Progress
    from locft_jax.io import hf_load

    distributed.HEARTBEAT = heartbeat or distributed.HEARTBEAT
    if heartbeat:  # it is to be killed
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    if stop_at:
        Progress.on_step = stopping_at(stop_at)  # type: ignore[method-assign]

    make, load = jax.make_array_from_callback, hf_load.load_weights

    def load_weights(*arguments, **more):
        sizes = []

        def counted(shape, sharding, callback):
            def own(index):
                part = callback(index)
                sizes.append(part.nbytes)
                return part

            return make(shape, sharding, own)

        jax.make_array_from_callback = counted
        weights = load(*arguments, **more)
        jax.make_array_from_callback = make
        with open(f"loaded-{jax.process_index()}", "a") as f:
            print(sum(sizes), file=f)
        return weights

    hf_load.load_weights = load_weights

    def main(argv):
        parser = argparse.ArgumentParser()
        distributed.add_flags(parser)
        with distributed.joined(parser.parse_args(argv)):
            for name, arguments in jobs:
                command = importlib.import_module(f"locft_jax.cli.{name}")
                command.carry_out(command.parse(arguments))

    return run_command(main, place)


def script(path: Path, arguments: list[str]) -> int:
    """A script of this repository."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0

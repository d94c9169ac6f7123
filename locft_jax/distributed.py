"""One run in several processes, one a host of a TPU pod, each with the devices of its host.

All of them run the same command on the same inputs, and every computation needs them all: what a clock, a
signal, a disk or free memory says is agreed on before any acts on it. The first alone writes and prints.
With one process nothing here does anything.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np

from locft_jax import logs
from locft_jax.errors import UserError, reason

HEARTBEAT = 30  # seconds after which a process that says nothing counts as dead
PATIENCE = 300  # seconds that processes wait for each other when they begin
CHILD = "LOCFT_JAX_CHILD"  # set in a supervised process: the pipe that tells it of its supervisor's end
LOST = (
    f"another process of this run died, cannot be reached or did not begin within {PATIENCE} s; its log says "
    "why; an edit goes on from its last checkpoint with the same command and --resume on all hosts"
)
SIGNS = ("Gloo", "NCCL", "coordination service", "heartbeat", "Connection", "UNAVAILABLE", "DEADLINE")


_checking = True  # the others wait in `agree` for a process that meets wrong input


class Agreed(UserError):
    """Wrong input in one process, told to all."""


# ---------------------------------------------------------------- how processes come and go


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags by which a command is told that it is one of several processes."""
    add = parser.add_argument_group("several hosts (a TPU pod needs none of these)").add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is met (JAX_COORDINATOR_ADDRESS)")
    add("--processes", metavar="N", help="how many there are (JAX_NUM_PROCESSES)")
    add("--process", metavar="I", help="which one this is, from 0 on (JAX_PROCESS_ID)")


def parse_place(args: argparse.Namespace) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is told: flags first, then the environment; {} on the hosts of a
    TPU pod, where jax finds out by itself; None for a single process. Raises UserError."""
    given = {
        "--coordinator": args.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "--processes": args.processes or os.environ.get("JAX_NUM_PROCESSES"),
        "--process": args.process or os.environ.get("JAX_PROCESS_ID"),
    }
    missing = [flag for flag, value in given.items() if not value]
    if len(missing) == 3:
        return {} if pod_size() > 1 else None
    if given["--processes"] == "1":
        return None
    if missing:
        raise UserError(f"{missing[0]}: missing; {', '.join(given)} go together")
    host, _, port = str(given["--coordinator"]).rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator: {given['--coordinator']!r} must be HOST:PORT, such as 10.0.0.2:8476")
    count, number = (str(given[flag]) for flag in ("--processes", "--process"))
    if not count.isdecimal() or not number.isdecimal() or int(number) >= int(count):
        raise UserError(f"--process: {number} of {count} processes; they are counted from 0 to N - 1")
    return {
        "coordinator_address": given["--coordinator"],
        "num_processes": int(count),
        "process_id": int(number),
    }


def pod_size() -> int:
    """Hosts of the TPU slices that this machine is part of, as its environment (GKE) or its metadata server
    (a TPU VM) says; 1 where there is no TPU."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms:
        return 1
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not names and "TPU_SKIP_MDS_QUERY" not in os.environ:  # jax sets it where it sees no TPU
        server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            names = direct.open(request, timeout=5).read().decode()
        except OSError:
            names = ""
    return len((names or "").split(",")) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)


@contextmanager
def joined(args: argparse.Namespace, program: bool) -> Iterator[None]:
    """Around a command that may be one of several processes; all of them leave it together. A `program`
    (`python -m ...`) is then run by a supervisor, which ends with the program's status."""
    place = parse_place(args)
    if place is None:
        yield
        return
    if program and CHILD not in os.environ:
        sys.exit(supervise([sys.executable, *sys.orig_argv[1:]]))
    if CHILD in os.environ:
        threading.Thread(target=_watch, args=(int(os.environ.pop(CHILD)),), daemon=True).start()
    connect(place)
    try:
        try:
            yield
        except Agreed:
            raise
        except UserError as e:
            if _checking:
                _exchange({}, str(e))  # where `agree` is in the others
            raise
    except Agreed:
        leave()
        raise
    leave()


def connect(place: Mapping[str, Any]) -> None:
    """Find the other processes. Raises UserError, and ConnectionError where they cannot be reached."""
    if place.get("process_id") == 0:
        port = int(place["coordinator_address"].rpartition(":")[2])
        try:
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as e:  # jax would crash
            raise UserError(f"--coordinator: port {port} of this host cannot be used ({e})") from None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs in flight together run in any order on a CPU, whose processes would wait for each other.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours (editing/checkpoint.py)
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as e:
        raise UserError(
            f"several hosts: jax does not see who they are ({reason(e)}); on a TPU pod install .[tpu], "
            "elsewhere say --coordinator, --processes and --process"
        ) from None
    except RuntimeError as e:
        raise ConnectionError(f"the processes of this run did not find each other ({reason(e)})") from None
    logs.quiet = jax.process_index() > 0


def supervise(command: list[str]) -> int:
    """Run a process of several and wait for it: when another one dies jax aborts it in C++, where Python
    has no say. Signals are passed on, and it ends with its supervisor. Its exit status; 1 after an abort."""
    reader, writer = os.pipe()
    # In a session of its own Ctrl-C reaches it once, through us.
    child = subprocess.Popen(
        command, env={**os.environ, CHILD: str(reader)}, pass_fds=[reader], start_new_session=True
    )
    os.close(reader)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: child.send_signal(n))
    status = child.wait()
    os.close(writer)
    if status == -signal.SIGABRT:
        print(f"failed: {LOST}", file=sys.stderr)
    elif status < 0:
        print(f"failed: {signal.Signals(-status).name} ended this process", file=sys.stderr)
    return max(status, 0) or int(status < 0)


def _watch(pipe: int) -> None:
    """Nothing is ever written to the pipe: reading ends when the supervisor does."""
    os.read(pipe, 1)
    os._exit(1)


def leave() -> None:
    """End together with the other processes, which come here too."""
    if several():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("leave")
        jax.distributed.shutdown()


def abandon(status: int) -> NoReturn:
    """End without the other processes, which notice; Python's own end would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost(error: Exception) -> bool:
    """Whether a computation failed because another process is gone."""
    return several() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


# ---------------------------------------------------------------- what they agree on


def several() -> bool:
    """Whether this is one of several processes that have not left yet."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process writes and prints."""
    return not several() or jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What every process says, in their order. All must come here, as in every function below."""
    if not several():
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    own = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(np.int32(own.size))
    room = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes: each is compiled
    room[: own.size] = own
    rows = process_allgather(room)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """The first process's value (of JSON types) in all of them."""
    return json.loads(gather(json.dumps(value) if first() else "")[0]) if several() else value


def array_from_first(value: np.ndarray) -> np.ndarray:
    """The first process's array, bit for bit, in all of them: they give one of its shape and dtype, of 4
    bytes an element."""
    if not several():
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    bits = broadcast_one_to_all(np.ascontiguousarray(value).reshape(-1).view(np.uint32))
    return np.asarray(bits).view(value.dtype).reshape(value.shape)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any process has set it."""
    if not several():
        return flags
    from jax.experimental.multihost_utils import process_allgather

    return tuple(bool(f) for f in process_allgather(np.array(flags)).any(axis=0))


def least(*numbers: float) -> tuple[float, ...]:
    """Of each number the smallest that any process has."""
    return tuple(map(min, zip(*map(json.loads, gather(json.dumps(numbers))), strict=True)))


def agree(given: Mapping[str, Any] | None = None, last: bool = False) -> None:
    """The end of a round of checks, of the `last` one before the work itself: go on together, or raise the
    UserError that any process has met. Inputs (of JSON types) that are not the same in all of them are one
    too."""
    global _checking
    if several():
        _exchange(given or {}, None)
    _checking = not last


def _exchange(given: Mapping[str, Any], wrong: str | None) -> None:
    said = [json.loads(text) for text in gather(json.dumps([wrong, given]))]
    messages = [message for message, _ in said]
    for number, message in enumerate(messages):
        if message is not None:
            raise Agreed(message if not number else f"process {number}: {message}")
    for number, (_, other) in enumerate(said):
        own = said[0][1]
        keys = dict.fromkeys([*own, *other])
        differ = [
            f"{k}: {str(own.get(k))[:80]} / {str(other.get(k))[:80]}"
            for k in keys
            if own.get(k) != other.get(k)
        ]
        if differ:
            lines = "\n  ".join(differ)
            raise Agreed(f"processes 0 and {number} were not given the same:\n  {lines}")


def alone() -> Any:
    """orbax's options for what the first process does without the others."""
    import orbax.checkpoint as ocp

    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})

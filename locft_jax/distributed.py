"""One run in several processes, one a host of a TPU pod, each with the devices of its host.

All run the same command on the same inputs, and every computation needs them all: what a clock, a signal, a
disk or free memory says is agreed on before any acts on it. The first alone writes and prints. With one
process nothing here does anything. Where one dies or falls silent, `jax.distributed` aborts the others.
"""

import argparse
import json
import os
import re
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather, sync_global_devices

from locft_jax.errors import UserError, reason
from locft_jax.logs import log

HEARTBEAT = 30  # seconds after which a process that says nothing counts as dead
PATIENCE = 300  # seconds that processes wait for each other when they begin
LOST = ("another process of this run died, cannot be reached or did not begin; its log says why; an edit "
        "resumes from its last checkpoint with the same command and --resume on all hosts")  # fmt: skip
SIGNS = ("Gloo", "NCCL", "coordination service", "heartbeat", "Connection", "UNAVAILABLE", "DEADLINE")
_checking = True  # the others wait in `agree` for a process that meets wrong input


class Agreed(UserError):
    """Wrong input in one process, known to all."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags by which a command learns that it is one of several processes; else the environment says."""
    group = parser.add_argument_group("several hosts (a TPU pod needs none of these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 (JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--processes", metavar="N", type=int, help="how many (JAX_NUM_PROCESSES)")
    group.add_argument("--process", metavar="I", type=int, help="this one, from 0 on (JAX_PROCESS_ID)")
    names = {"coordinator": "COORDINATOR_ADDRESS", "processes": "NUM_PROCESSES", "process": "PROCESS_ID"}
    parser.set_defaults(**{flag: os.environ.get(f"JAX_{name}") or None for flag, name in names.items()})


def parse_place(args: argparse.Namespace) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` ({} on a TPU pod); None for a single process."""
    address, count, number = given = (args.coordinator, args.processes, args.process)
    if given == (None, None, None):
        return {} if pod_size() > 1 else None
    if count == 1:
        return None
    if None in given or not re.fullmatch(r".+:\d+", address) or not 0 <= number < count:
        rule = "--coordinator HOST:PORT, --processes N and --process I (from 0 to N - 1) go together"
        raise UserError(f"{rule}; given: {address}, {count}, {number}")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def pod_size() -> int:
    """Hosts of this machine's TPU slices: the environment (GKE) or the metadata server (a TPU VM) says."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return 1
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    if not names and "TPU_SKIP_MDS_QUERY" not in os.environ:  # jax sets it where it sees no TPU
        server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with suppress(OSError):
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            names = direct.open(request, timeout=5).read().decode()
    return len(names.split(",")) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Around a command that may be one of several processes; all of them leave it together."""
    if (place := parse_place(args)) is None:
        yield
        return
    connect(place)
    try:
        yield
    except Agreed:
        leave()
        raise
    except UserError as e:
        if _checking:
            try:
                agree(wrong=str(e))  # where the others are
            finally:
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
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours (editing/checkpointer.py)
    waits: dict[str, Any] = {"initialization_timeout": PATIENCE, "heartbeat_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(**place, **waits, shutdown_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as e:  # a ValueError on a TPU pod whose jax lacks libtpu
        hint = "on a TPU pod install .[tpu], elsewhere give --coordinator, --processes and --process"
        raise ConnectionError(f"this process did not find the others ({reason(e)}); {hint}") from None
    if jax.process_index():
        log.setLevel("ERROR")  # the first alone speaks
    log.info(f"{jax.process_count()} processes; should one die, jax aborts the others within {HEARTBEAT} s")


def leave() -> None:
    """End together with the other processes, which come here too."""
    if several():
        sync_global_devices("leave")
        jax.distributed.shutdown()


def lost(error: Exception) -> bool:
    """Whether a computation failed because another process is gone."""
    return several() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def several() -> bool:
    """Whether this is one of several processes that have not left yet."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process writes and prints."""
    return not several() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Each process's value (of JSON types). All must come here, as in every function below."""
    if not several():
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(own.size))
    room = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes: each is compiled
    room[: own.size] = own
    rows = process_allgather(room)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """The first process's value (of JSON types) in all of them."""
    return gather(value if first() else None)[0]


def array_from_first(value: np.ndarray) -> np.ndarray:
    """The first process's array (4 bytes an element) in all of them, bit for bit: a sum would lose -0.0."""
    if not several():
        return value
    bits = broadcast_one_to_all(np.ascontiguousarray(value).reshape(-1).view(np.uint32))
    return np.asarray(bits).view(value.dtype).reshape(value.shape)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any process has set it."""
    return tuple(process_allgather(np.array(flags)).any(axis=0).tolist()) if several() else flags


def least(*numbers: float) -> tuple[float, ...]:
    """Of each number the smallest that any process has."""
    return tuple(map(min, zip(*gather(numbers), strict=True)))


def agree(given: Mapping[str, Any] | None = None, last: bool = False, wrong: str | None = None) -> None:
    """The end of a round of checks, of the `last` one before the work itself: go on together, or raise the
    UserError that any process has met. Inputs (of JSON types) that differ between them are one too."""
    global _checking
    heard = gather([wrong, given or {}])
    for number, (message, _) in enumerate(heard):
        if message is not None:
            raise Agreed(f"process {number}: {message}" if number else message)
    own = heard[0][1]
    for number, (_, other) in enumerate(heard):
        pairs = [(key, own.get(key), other.get(key)) for key in {**own, **other}]
        if differ := [f"\n  {k}: {str(a)[:80]} / {str(b)[:80]}" for k, a, b in pairs if a != b]:
            raise Agreed(f"processes 0 and {number} were not given the same:{''.join(differ)}")
    _checking = not last

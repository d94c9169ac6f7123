"""One run in several processes: real ones, on this machine, with 4 fake devices each.

The reference is the same run in this process on one device. One pair runs several commands.
"""

import argparse
import importlib
import json
import math
import os
import re
import signal
import socket
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked import WITHIN, Forked, one_of_several
from safetensors.numpy import load_file

from locft_jax import distributed
from locft_jax.cli.command import run_command
from locft_jax.cli.edit import main as edit
from locft_jax.cli.evaluate import main as evaluate
from locft_jax.errors import UserError
from locft_jax.io.delta import BASE
from locft_jax.model.spec import parse_spec
from locft_jax.model.weights import weight_table
from locft_jax.studies.tables import FIGURES

SHORT = {"num_steps": 4, "loss_floor": 0, "checkpoint_every": 3}  # 12 steps, and one in four is kept
MESHES = {"data": "{data: 2, model: 4}", "model": "{data: 1, model: 8}"}  # what crosses processes
# What each of them runs, and on one device.
RUNS = {
    "data": {**SHORT, "prefix_cache": "device"},
    "model": {**SHORT, "prefix_cache": "disk", "preserve": "kfac", "preserve_kl": 1, "evaluate": "false"},
}


class Pair:
    """Two processes of one run. `jobs[i]`: the commands of process i; the second one is told its place by
    the environment."""

    def __init__(self, folder, jobs, stop_at=None, heartbeat=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        places = [["--coordinator", address, "--processes", "2", "--process", "0"], []]
        told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        each = [(jobs[0], places[0], None, heartbeat), (jobs[1], places[1], stop_at, heartbeat)]
        envs = [devices, devices | told]
        self.processes = [Forked(folder, one_of_several, *each[i], **envs[i]) for i in range(2)]

    def wait(self) -> list[int]:
        """The exit statuses."""
        return [process.wait() for process in self.processes]

    def said(self, i: int) -> tuple[str, str]:
        """(stdout, stderr) of process i."""
        return self.processes[i].said()


def result(out: Path) -> dict:
    """What a run left, read without any of this program."""
    lines = lambda name: [json.loads(t) for t in (out / name).read_text().splitlines()]  # noqa: E731
    return {
        "losses": [line["loss"] for line in lines("steps.jsonl")],
        "predictions": lines("predictions.jsonl"),
        "delta": load_file(out / "delta.safetensors"),
        "report": json.loads((out / "report.json").read_text()),
    }


def check_equal(out: Path, reference: dict) -> None:
    """The same losses, delta and answers as on one device."""
    found = result(out)
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=1e-5)
    assert found["predictions"] == reference["predictions"]
    assert [found["report"][k] for k in ("before", "after")] == [
        reference["report"][k] for k in ("before", "after")
    ]
    assert set(found["delta"]) == set(reference["delta"])
    for name, value in reference["delta"].items():
        own = found["delta"][name]
        if name.startswith(BASE):
            assert own.tobytes() == value.tobytes()
        else:
            move = np.linalg.norm(value - reference["delta"][BASE + name])
            assert move > 0.02 and np.linalg.norm(own - value) < 1e-3 * move


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def reference(edit_arguments, folder):
    """`reference(settings)` -> the result on one device of this process."""
    known = {}

    def run(settings):
        key = json.dumps(settings)
        if key not in known:
            out = folder / f"reference-{len(known)}"
            assert run_command(edit, edit_arguments(out, **settings)) == 0
            known[key] = result(out)
        return known[key]

    return run


def compared(edit_arguments, out, name, folder, mesh=MESHES["data"]):
    """Arguments of `locate` and of `sweep` for one edit each."""
    options = {"locate": ["--modules", "down", "--layers", "1"], "sweep": [str(folder / "rates.yaml")]}
    return [*options[name], *edit_arguments(out, num_steps=3, mesh=mesh)]


@pytest.fixture(scope="module")
def pair(edit_arguments, folder, tiny_model_dir, edits_file):
    """Two processes that ran five commands: an edit on either mesh, an evaluation of what the first of them
    left, a search for the site and a sweep."""
    (folder / "rates.yaml").write_text("grid:\n  lr: [0.003]\n")
    jobs = []
    for i in range(2):
        out = folder / f"process-{i}"
        edits = [edit_arguments(out / axis, **RUNS[axis], mesh=MESHES[axis]) for axis in MESHES]
        delta = str(folder / "process-0" / "data" / "delta.safetensors")
        measure = ["--model", str(tiny_model_dir), "--delta", delta, "--data", str(edits_file)]
        measure += ["--out", str(out) + ".json", "--set", "weights=int8", f"mesh={MESHES['model']}"]
        compare = {name: compared(edit_arguments, out / name, name, folder) for name in ("locate", "sweep")}
        jobs.append([["edit", arguments] for arguments in edits] + [["evaluate", measure], *compare.items()])
    run = Pair(folder, jobs)
    assert run.wait() == [0, 0], list(map(run.said, range(2)))
    return run


# ---------------------------------------------------------------- two processes are one device


@pytest.mark.parametrize("axis", MESHES)
def test_two_processes_are_one_device(pair, folder, reference, axis):
    check_equal(folder / "process-0" / axis, reference(RUNS[axis]))
    report = json.loads((folder / "process-0" / axis / "report.json").read_text())
    assert len(report["devices"]) == 8 and report["activation_cache"] == RUNS[axis]["prefix_cache"]


@pytest.mark.parametrize("axis", MESHES)
def test_every_export_is_written_once_and_whole(pair, folder, tiny_model_dir, axis):
    out = folder / "process-0" / axis
    delta = load_file(out / "delta.safetensors")
    base, edited = (load_file(d / "model.safetensors") for d in (tiny_model_dir, out / "hf"))
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(out / "orbax")
    for name in base:
        expected = delta.get(name, base[name]).tobytes()
        assert edited[name].tobytes() == np.asarray(restored[name]).tobytes() == expected, name
    assert not (out / "checkpoint").exists()


def test_the_first_process_alone_writes_and_prints(pair, folder):
    assert not (folder / "process-1").exists() and not (folder / "process-1.json").exists()
    assert pair.said(0)[0].count("written to ") == 4
    lines = "".join(pair.said(1)).splitlines()
    # XLA itself says who is connected (threads may share a line), and warns (W1125 12:46:54 ...).
    ours = [line for line in lines if line and not re.search(r"^W\d{4} |connected |^\[Gloo\]", line)]
    assert not ours, ours


def test_an_evaluation_in_int8_in_two_processes(pair, folder, tiny_model_dir, edits_file):
    one = folder / "one.json"
    delta = folder / "process-0" / "data" / "delta.safetensors"
    arguments = ["--model", tiny_model_dir, "--delta", delta, "--data", edits_file, "--out", one]
    arguments += ["--set", "weights=int8", "mesh={data: 1, model: 1}"]
    assert run_command(evaluate, [str(a) for a in arguments]) == 0
    expected, found = (json.loads(p.read_text()) for p in (one, folder / "process-0.json"))
    assert [found[k] for k in ("figures", "predictions")] == [expected[k] for k in ("figures", "predictions")]


@pytest.mark.parametrize(("name", "lines"), [("locate", "sites"), ("sweep", "runs")])
def test_two_processes_compare_as_one_does(pair, folder, edit_arguments, name, lines):
    command, found = importlib.import_module(f"locft_jax.cli.{name}"), {}
    one = folder / f"one-{name}"
    alone = compared(edit_arguments, one, name, folder, "{data: 1, model: 1}")
    assert run_command(command.main, alone) == 0
    for out in (one, folder / "process-0" / name):
        own = json.loads(next(out.glob("s*.json")).read_text())[lines]
        assert not (out / "checkpoint").exists()
        found[out] = [
            {key: line[key] for key in ("steps", "before", *FIGURES) if key in line} for line in own
        ]
    assert len(found[one]) == 1 and found[one] == found[folder / "process-0" / name]


def test_each_process_loads_what_its_own_devices_hold(pair, folder, tiny_model_dir):
    spec = parse_spec(json.loads((tiny_model_dir / "config.json").read_text()))
    sizes = {k: 4 * math.prod(row.shape) * max(1, row.layers) for k, row in weight_table(spec).items()}
    halves = sum(
        sizes[k] for k in ("embed", "head", "k", "v", "gate", "up", "down")
    )  # split 8 ways, 4 of them here
    for i in range(2):
        _, model, *_ = map(int, (folder / f"loaded-{i}").read_text().split())
        assert model == halves // 2 + sum(sizes.values()) - halves


# ---------------------------------------------------------------- stop, resume, die


def test_a_signal_to_one_stops_both_at_one_step_and_they_resume(folder, edit_arguments, reference):
    """The second process is told to stop; both go on from there. Its --out is a folder of its own: what is
    kept lies with the first."""
    settings = {**RUNS["data"], "mesh": MESHES["data"], "export": "delta"}
    jobs = [[["edit", edit_arguments(folder / f"stopped-{i}" / "out", **settings)]] for i in range(2)]
    run = Pair(folder, jobs, stop_at=5)
    assert run.wait() == [1, 1], list(map(run.said, range(2)))
    assert "interrupted: the run up to step 6 can be found in" in run.said(0)[1]
    assert "interrupted" not in run.said(1)[1] and "Traceback" not in "".join(map(str, map(run.said, (0, 1))))
    jobs = [[[name, [*arguments, "--resume"]] for name, arguments in own] for own in jobs]
    run = Pair(folder, jobs)
    assert run.wait() == [0, 0], list(map(run.said, range(2)))
    check_equal(folder / "stopped-0" / "out", reference(RUNS["data"]))
    report = json.loads((folder / "stopped-0" / "out" / "report.json").read_text())
    assert report["resumed"] == [6] and report["steps_run"] == 12
    assert not (folder / "stopped-1").exists()


@pytest.mark.parametrize("how", ["killed", "unreachable"])
def test_a_dead_process_ends_the_other(folder, edit_arguments, how):
    """kill -9 closes its connections, which a CPU's collectives notice at once; a host that is unreachable
    only falls silent, and jax aborts the other process after the heartbeat's timeout."""
    out = folder / how / "out"
    settings = {"num_steps": 100_000, "loss_floor": 0, "evaluate": "false", "mesh": MESHES["data"]}
    arguments = edit_arguments(out, **settings, checkpoint_every=1)
    run = Pair(folder, [[["edit", arguments]]] * 2, heartbeat=10)
    first, second = run.processes
    try:
        end = time.monotonic() + WITHIN
        while not any((out / "checkpoint" / "steps").glob("[0-9]*")) and time.monotonic() < end:
            assert first.status() is second.status() is None, [run.said(i) for i in range(2)]
            time.sleep(0.1)
        begin = time.monotonic()
        os.kill(second.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        status, message = first.wait(), run.said(0)[1]
        assert time.monotonic() - begin < 60  # what users are promised, not a measure of this machine
    finally:
        with suppress(ProcessLookupError):
            os.kill(second.pid, signal.SIGKILL)
        first.wait(1)
    if status == 1:
        assert f"failed: {distributed.LOST}" in message and "Traceback" not in message, message
    else:  # jax's own words
        assert status == -signal.SIGABRT and how == "unreachable" or "another task died" in message, message
    assert any((out / "checkpoint" / "steps").iterdir())  # to go on from


def test_wrong_input_of_one_process_ends_both(folder, edit_arguments):
    jobs = [
        [["edit", edit_arguments(folder / "wrong", mesh=MESHES["data"], data_path=path)]]
        for path in (folder / "edits.json", "missing.json")
    ]
    (folder / "edits.json").write_text('[{"prompt": "p", "target_new": "t"}]')
    run = Pair(folder, jobs)
    assert run.wait() == [2, 2]
    assert "error: process 1: missing.json: no such file" in run.said(0)[1]
    assert "error" not in run.said(1)[1] and not (folder / "wrong").exists()


# ---------------------------------------------------------------- without processes


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def nowhere(monkeypatch):
    """An environment that says nothing of other hosts."""
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "PLATFORMS"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return monkeypatch


def test_flags_then_environment_then_pod(nowhere):
    assert distributed.parse_place(flags()) is None
    place = {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    every = ["--coordinator", "a:1", "--processes", "4", "--process", "3"]
    assert distributed.parse_place(flags(*every)) == place
    assert distributed.parse_place(flags("--processes", "1")) is None
    nowhere.setenv("TPU_WORKER_HOSTNAMES", "t1k-0,t1k-1")
    assert distributed.parse_place(flags()) == {}
    nowhere.setenv("JAX_PLATFORMS", "cpu")
    assert distributed.parse_place(flags()) is None
    for name, value in (("COORDINATOR_ADDRESS", "b:2"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        nowhere.setenv(f"JAX_{name}", value)
    place = {"coordinator_address": "b:2", "num_processes": 2, "process_id": 1}
    assert distributed.parse_place(flags("--process", "1")) == place


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2"], "given: None, 2, None"),
        (["--coordinator", "a:1", "--processes", "2"], "given: a:1, 2, None"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "given: a, 2, 0"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "given: a:1, 2, 2"),
    ],
)
def test_wrong_flags(nowhere, arguments, said):
    with pytest.raises(UserError, match=f"--coordinator HOST:PORT, --processes N and --process I.* {said}"):
        distributed.parse_place(flags(*arguments))


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        for number, said in ((port, "Address already in use"), (70000, "must be 0-65535")):
            place = {"coordinator_address": f"localhost:{number}", "num_processes": 2, "process_id": 0}
            with pytest.raises(UserError, match=f"port {number} of this host cannot be used .*{said}"):
                distributed.connect(place)


def test_the_metadata_server_of_a_tpu_vm(nowhere):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            found = self.path.endswith("/instance/attributes/worker-network-endpoints")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(b"u:1:10.0.0.1,u:2:10.0.0.2,u:3:10.0.0.3,u:4:10.0.0.4")

        def log_message(self, *arguments):
            pass

    with HTTPServer(("localhost", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        nowhere.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        assert distributed.pod_size() == 1  # jax saw no TPU
        nowhere.delenv("TPU_SKIP_MDS_QUERY")
        assert distributed.pod_size() == 4
        nowhere.setenv("MEGASCALE_NUM_SLICES", "2")
        assert distributed.pod_size() == 8
        server.shutdown()
    assert distributed.pod_size() == 2  # no answer: one host, of two slices


def test_one_process_agrees_with_itself():
    assert distributed.first() and not distributed.several()
    assert distributed.any_of(False, True) == (False, True)
    assert distributed.least(2.5, float("inf")) == (2.5, float("inf"))
    assert distributed.from_first({"a": 1}) == {"a": 1}


def test_inputs_that_differ_are_named(monkeypatch):
    given = [{"lr": 1, "seed": 0}, {"lr": 1, "seed": 0}, {"lr": 2, "seed": 0}]
    monkeypatch.setattr(distributed, "gather", lambda value: [[None, g] for g in given])
    with pytest.raises(distributed.Agreed, match=r"processes 0 and 2 were not given the same:\n  lr: 1 / 2$"):
        distributed.agree()
    given[2] = {"lr": 1, "seed": 0, "more": 1}
    with pytest.raises(distributed.Agreed, match=r"the same:\n  more: None / 1$"):
        distributed.agree()
    given.pop()
    distributed.agree()

"""What a run needs on each device: counted by hand, split by the mesh, and what is there."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from locft_jax.data.packing import corpus_from_lists
from locft_jax.errors import UserError
from locft_jax.io import hf_folder, hf_load
from locft_jax.model import memory
from locft_jax.model.memory import Room, Step, as_text, check_memory, estimate, step_of
from locft_jax.model.sharding import make_mesh
from locft_jax.model.spec import parse_spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"
SITE = ("model.layers.22.mlp.down_proj.weight",)


@pytest.fixture(scope="module")
def llama():
    return parse_spec(json.loads((CONFIGS / "Meta-Llama-3-8B-Instruct.json").read_text()))


def test_bytes_of_a_known_model(llama):
    need = estimate(llama, {"data": 1, "model": 1}, 2, SITE)
    assert need.weights == 2 * 8_030_261_248  # Llama-3-8B's parameters
    assert need.tuned == 4096 * 14336 * 4 * 4  # master, two moments and gradient in float32
    assert need.step == 0
    halves = estimate(llama, {"data": 1, "model": 8}, 2, SITE)
    assert halves.tuned == need.tuned / 8
    norms = 2 * (2 * 32 + 1) * 4096  # not split
    assert halves.weights == (need.weights - norms) / 8 + norms


def test_int8_is_a_byte_a_weight_and_a_scale_a_row(llama):
    norms = (2 * 32 + 1) * 4096
    rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096) + 2 * 128256
    step = Step(100, 3072, 64, 600, 22)
    half, int8 = (estimate(llama, {"data": 1, "model": 1}, 2, SITE, step, q) for q in (False, True))
    assert int8.weights == 8_030_261_248 - norms + 2 * norms + 4 * rows
    assert int8.tuned == half.tuned
    assert int8.step == half.step + 2 * 128256 * 4096  # the head, converted


def test_what_is_counted_is_what_is_loaded(tiny_model_dir):
    checkpoint = hf_folder.open_folder(str(tiny_model_dir))
    mesh = make_mesh({"data": 2, "model": 4})
    weights = hf_load.load_weights(checkpoint, mesh)
    shards = [a.addressable_shards[0].data.nbytes for a in weights.values()]
    assert estimate(checkpoint.spec, mesh.shape, 4).weights == sum(shards)


def test_a_step_grows_with_tokens_and_layers_and_shrinks_with_the_mesh(llama):
    size = lambda step, data=1, model=1: estimate(llama, {"data": data, "model": model}, 2, SITE, step).step  # noqa: E731
    step = Step(100, 3072, 64, 600, 22)
    logits = 600 * 128256 * 2 * 4
    one = size(step) - logits
    token = 2 * (2 * 4096 + 2 * 1024 + 2 * 4096 + 2 * 14336) + 32 * 64 * 4  # bf16 products, float32 scores
    assert one == 10 * 3072 * token
    assert size(Step(100, 6144, 64, 600, 22)) - logits == 2 * one
    assert size(Step(100, 3072, 64, 600, 27)) - logits == one / 2
    assert size(step, data=2) - logits == one / 2
    assert size(step, model=8) == (one + logits) / 8  # the residual stream too
    heads = size(step, model=16) - (one + logits) / 16  # its 8 key and value heads are not split
    assert heads == 10 * 3072 * 2 * (2 * 1024 - 2 * 1024 / 16)


def test_the_size_of_a_batch_is_that_of_mean_examples():
    corpus = corpus_from_lists([np.zeros(n) for n in (20, 40)] * 50, [10, 30] * 50)
    assert step_of(corpus, 20, 64, 3) == Step(20, 11 * 64, 64, 200, 3)
    assert step_of(corpus, 1000, 32, 3) == Step(100, 83 * 40, 40, 1000, 3)  # all, in rows of the longest


def test_a_step_that_does_not_fit_is_a_warning_with_a_batch_size_that_does(llama):
    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    step = Step(100, 3072, 64, 600, 22)
    need = estimate(llama, mesh.shape, 2, SITE, step)
    room = lambda step: Room(need.certain + step, False)  # noqa: E731
    assert check_memory(llama, mesh, 2, SITE, step, room(need.step)) == []
    (warning,) = check_memory(llama, mesh, 2, SITE, step, room(need.step // 3))
    assert "batch_size=25 would be safer" in warning and "tuned state" in warning
    assert check_memory(llama, mesh, 2, SITE, None, room(0)) == []
    with pytest.raises(UserError, match="15.8[0-9] GiB are needed on each of 1 device"):
        check_memory(llama, mesh, 2, SITE, step, room(-1))


def test_what_is_free(monkeypatch):
    one, all_of_them = (make_mesh({"data": 1, "model": n}, jax.devices()[:n]) for n in (1, 8))
    monkeypatch.setattr(memory, "host_memory", lambda: 800)
    assert memory.device_memory(one) == Room(800, True)
    assert memory.device_memory(all_of_them) == Room(100, True)  # they share it

    class Device:
        def __init__(self, limit):
            self.memory_stats = lambda: {"bytes_limit": limit, "bytes_in_use": 5}

    class Mesh:
        local_devices = [Device(50), Device(30)]

    assert memory.device_memory(Mesh()) == Room(25, False)


V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
MACHINE = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\n"}


def group(folder, most, used, cached=""):
    names = ("limit_in_bytes", "usage_in_bytes") if folder.startswith(V1) else ("max", "current")
    files = dict(zip(names, (most, used), strict=True)) | {"stat": f"anon 1\n{cached}\n"}
    return {f"{folder}/memory.{name}": f"{text}\n" for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 2**63),
        (MACHINE, 7 * 1024),
        (MACHINE | group(V2, "max", 5), 7 * 1024),
        (MACHINE | group(V2, 900, 500), 400),
        (group(V2, 900, 500, "inactive_file 300"), 700),
        (MACHINE | {"/proc/self/cgroup": "0::/a/b\n"} | group(f"{V2}/a", 900, 500), 400),  # an ancestor's
        (MACHINE | {"/proc/self/cgroup": "0::/\n"} | group(V2, 900, 500), 400),
        (MACHINE | {"/proc/self/cgroup": "4:memory:/a\n0::/\n"} | group(f"{V1}/a", 900, 500), 400),
        (MACHINE | {"/proc/self/cgroup": "4:memory:/docker/1\n"} | group(V1, 900, 500), 400),
        (MACHINE | {"/proc/self/cgroup": "4:cpu,memory:/a\n"} | group(V1, 2**63 - 4096, 1), 7 * 1024),
        (MACHINE | {"/proc/self/cgroup": "4:memory:/a\n"}
         | group(V1, 900, 500, "inactive_file 1\ntotal_inactive_file 30"), 430),
    ],
)  # fmt: skip
def test_what_the_host_has(monkeypatch, files, free):
    """Of the machine, and of its container if that is less; files that are only cached can go."""
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(memory, "_output", lambda command: "")
    assert memory.host_memory() == free


def test_what_a_mac_has(monkeypatch):
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               5.\nPages active:                         1000.\n"
        "Pages inactive:                          20.\nPages speculative:                     300.\n"
    )
    monkeypatch.setattr(memory, "_read", lambda path: "")
    monkeypatch.setattr(memory, "_output", {"vm_stat": text}.get)
    assert memory.host_memory() == 325 * 16384


def test_the_caches_budget_is_a_share_of_the_same_figure(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    assert memory.memory_budgets(None) == (800 / len(jax.local_devices()), 800)
    assert memory.memory_budgets(0.5) == (2**29, 2**29)


def test_this_machine_has_memory():
    assert 2**20 < memory.host_memory() <= 2**63


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.00 KiB"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (2**29, "0.50 GiB"), (2**41, "2,048.00 GiB")],
)
def test_bytes_for_people(size, text):
    assert as_text(size) == text

"""Parts of tensors: the right bytes whatever the block, and host memory that the weights alone fill."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from locft_jax.io import hf_folder, hf_load, reading
from locft_jax.io.safetensors_header import read_header
from locft_jax.model.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(a file, the tensors in it)."""
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((37, 23), np.float32),
        "half": rng.standard_normal((16, 8)).astype(ml_dtypes.bfloat16),
        "row": rng.standard_normal(50, np.float32),
        "cube": rng.integers(-5, 5, (4, 5, 6)),
        "scalar": np.array(3.0, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "switches": rng.random(9) > 0.5,
    }
    path = tmp_path_factory.mktemp("stored") / "x.safetensors"
    save_file(tensors, path)
    return path, tensors


@pytest.mark.parametrize("block", [1, 100, 1000, 10**6])
@pytest.mark.parametrize("wanted", [None, np.float32, ml_dtypes.bfloat16])
def test_every_part_of_every_tensor(stored, monkeypatch, block, wanted):
    monkeypatch.setattr(reading, "BLOCK", block)
    path, tensors = stored
    header = read_header(path)
    assert set(header) == set(tensors)
    cuts = [slice(None), slice(0, 3), slice(2, 4), slice(3, 3), slice(1, None)]
    for name, value in tensors.items():
        mixed = [tuple(cuts[(i + d) % len(cuts)] for d in range(value.ndim)) for i in range(len(cuts))]
        rows = [(cut, *[slice(None)] * (value.ndim - 1))[: value.ndim] for cut in cuts]
        for at in mixed + rows:
            expected = value[at].astype(wanted or value.dtype)
            out = reading.empty(expected.shape, expected.dtype)
            assert not out.size or out.ctypes.data % reading.ALIGNMENT == 0
            for job in reversed(list(reading.jobs(path.parent, header[name], at, out))):  # in any order
                job()
            assert out.tobytes() == expected.tobytes(), (name, at)


def test_a_file_that_shrinks_meanwhile_is_an_error(stored, tmp_path):
    path, tensors = stored
    header = read_header(path)
    short = tmp_path / path.name
    short.write_bytes(path.read_bytes()[:-50])
    last = max(header, key=lambda n: header[n].begin)
    out = np.empty(tensors[last].shape, tensors[last].dtype)
    with pytest.raises(OSError, match="ends .* bytes before its header says"):
        for job in reading.jobs(tmp_path, header[last], (slice(None),) * out.ndim, out):
            job()


def test_a_cpu_device_takes_the_weights_as_they_were_read(tiny_model_dir, monkeypatch):
    made = []
    empty = reading.empty
    monkeypatch.setattr(reading, "empty", lambda *a: made.append(empty(*a)) or made[-1])
    weights = hf_load.load_weights(
        hf_folder.open_folder(str(tiny_model_dir)), make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    )
    places = {array.ctypes.data for array in made}
    assert all(a.addressable_data(0).unsafe_buffer_pointer() in places for a in weights.values())


MEASURE = """
import json, sys
from pathlib import Path
import jax
from locft_jax.io.orbax_export import save_orbax
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_opened
from locft_jax.model.sharding import make_mesh


def peak():  # of this process: getrusage's is also that of the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
mesh = make_mesh({"data": 1, "model": 1})
checkpoint = open_folder(str(folder))
jax.block_until_ready(jax.numpy.zeros(3))
begin = peak()
save_orbax(checkpoint, {}, folder.parent / "orbax")
orbax = peak()
model = load_opened(checkpoint, None, mesh)
jax.block_until_ready(model.weights)
print(json.dumps({"weights": checkpoint.nbytes(), "orbax": orbax - begin, "load": peak() - begin}))
"""


def test_host_memory_holds_the_weights_and_little_else(tmp_path):
    """A process that exports a made-up checkpoint of 0.6 GB (zeros, which take no disk) to orbax, then loads
    it. Each stack of matrices has 0.1 GB or more, so a copy of any would be seen."""
    spec = importlib.util.spec_from_file_location("loading", ROOT / "benchmarks" / "loading.py")
    assert spec and spec.loader
    loading = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loading)
    shape = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=4,
                 vocab_size=4096)  # fmt: skip
    size = loading.make_checkpoint(tmp_path / "model", 600_000_000, shape, sparse=True, file_size=10**8)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["weights"] == size > 550_000_000
    print(got)
    assert got["orbax"] < 200e6  # orbax itself, and a few tensors of 8 MB
    assert got["load"] - size < 200e6  # the same, and the program that looks for NaN

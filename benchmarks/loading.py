"""Loading a checkpoint: host memory beyond the weights, and time against plainly reading its files.

A made-up checkpoint in bfloat16 (Llama shape, random bytes, files of about 1 GB with an index) is read and
loaded in fresh processes in turn. Reading goes into fresh memory, in one thread. Cold: the files are dropped
from the page cache before (posix_fadvise, which a file system may ignore: the seconds tell). The best of
`--repeats` counts. Targets: peak memory less the weights <= 1 GiB; <= 1.5 times the reading cold, <= 2.5
warm.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMALL = dict(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
)
LARGE = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8,
             vocab_size=32000)  # fmt: skip
COMMON = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=2048,
              tie_word_embeddings=False, eos_token_id=0, bos_token_id=None)  # fmt: skip


def make_checkpoint(
    folder: Path, size: int, shape: dict[str, int], sparse: bool, file_size: int = 10**9
) -> int:
    """A model folder of about `size` bytes in files of about `file_size`, without a tokenizer; `sparse`:
    zeros that take no disk. Returns the bytes of its tensors."""
    from locft_jax.model.spec import parse_spec
    from locft_jax.model.weights import weight_table

    def tensors(layers: int) -> dict[str, tuple[int, ...]]:
        spec = parse_spec({**COMMON, **shape, "num_hidden_layers": layers})
        return {n: row.shape for row in weight_table(spec).values() for n in row.names()}

    def total(layers: int) -> int:
        return sum(2 * int(np.prod(s)) for s in tensors(layers).values())

    layers = max(1, (size - total(1)) // (total(2) - total(1)) + 1)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, own in tensors(layers).items():
        if sum(2 * int(np.prod(s)) for s in files[-1].values()) > file_size:
            files.append({})
        files[-1][name] = own
    folder.mkdir(parents=True, exist_ok=True)
    rng, weight_map = np.random.default_rng(0), {}
    for i, own in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys(own, file))
        header, at = {}, 0
        for name, dims in own.items():
            end = at + 2 * int(np.prod(dims))
            header[name], at = {"dtype": "BF16", "shape": dims, "data_offsets": [at, end]}, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                f.truncate(8 + len(text) + at)
            for begin in range(0, 0 if sparse else at, 2**26):
                bits = rng.integers(0, 2**16, min(2**26, at - begin) // 2, np.uint16)
                f.write((bits & 0xBFFF).tobytes())  # no exponent of ones: finite
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**COMMON, **shape, "num_hidden_layers": layers}))
    return total(layers)


def drop(folder: Path) -> None:
    """Ask the kernel to forget the files."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    """Seconds to read all weight files into fresh memory."""
    begin, kept = time.perf_counter(), []
    for path in sorted(folder.glob("*.safetensors")):
        kept.append(np.empty(path.stat().st_size, np.uint8))
        with open(path, "rb", buffering=0) as f:
            view, at = kept[-1].data, 0
            while count := f.readinto(view[at : at + 2**26]):
                at += count
    return time.perf_counter() - begin


def load(folder: Path) -> float:
    """Seconds to open, load and check the model, as every command does."""
    import jax

    from locft_jax.io.hf_folder import open_folder
    from locft_jax.io.hf_load import load_opened
    from locft_jax.model.sharding import make_mesh

    mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    begin = time.perf_counter()
    model = load_opened(open_folder(str(folder)), None, mesh)
    jax.block_until_ready(model.weights)
    return time.perf_counter() - begin


def child(what: str, folder: Path) -> None:
    seconds = {"read": read, "load": load}[what](folder)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": peak}))


def measure(what: str, folder: Path, cold: bool) -> dict[str, Any]:
    """`what` in a fresh process: {seconds, peak}, peak resident bytes."""
    if cold:
        drop(folder)
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a smoke run in seconds")
    parser.add_argument("--size", type=float, default=3.0, help="GB of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk: for memory only")
    parser.add_argument(
        "--folder", type=Path, help="where it is made, and left (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("read", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, args.folder)

    from common import finish, hardware

    size, repeats = (1_000_000, 1) if args.small else (round(args.size * 1e9), args.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        shape, file_size = (SMALL, size // 3) if args.small else (LARGE, 10**9)
        weights = make_checkpoint(folder, size, shape, args.sparse, file_size)
        rows = []
        for cold in (True, False):
            if not cold:
                measure("read", folder, cold)  # now they are in the page cache, if they fit
            found = {what: [] for what in ("read", "load")}
            for _ in range(repeats):
                for what, results in found.items():
                    results.append(measure(what, folder, cold))
            seconds = {what: min(r["seconds"] for r in results) for what, results in found.items()}
            peak = max(r["peak"] for r in found["load"])
            row = {
                "cache": "cold" if cold else "warm",
                "read_seconds": seconds["read"],
                "load_seconds": seconds["load"],
                "ratio": seconds["load"] / seconds["read"],
                "beyond_weights_gib": (peak - weights) / 2**30,
            }
            print(
                f"{row['cache']}: read {seconds['read']:.2f} s, loaded {seconds['load']:.2f} s "
                f"({row['ratio']:.2f} times), peak memory less weights {row['beyond_weights_gib']:.2f} GiB",
                flush=True,
            )
            rows.append(row)
    finish({"benchmark": "loading", "weights": weights, "rows": rows, "hardware": hardware()}, args.out)


if __name__ == "__main__":
    main()

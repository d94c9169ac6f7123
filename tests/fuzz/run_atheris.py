"""The same checks on files that atheris changes, following the coverage of locft_jax (atheris is in no
extra: pip install atheris):

    python tests/fuzz/run_atheris.py data -atheris_runs=20000 [libFuzzer's options]

The target: data, config, model, tokens or delta. At the end it prints how many inputs were checked; an input
that breaks a promise ends it with a traceback.
"""

import atexit
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
import conftest  # noqa: E402  (sets the environment before jax is imported)

with atheris.instrument_imports(include=["locft_jax"]):
    from targets import VALID, Place, make_place, make_targets

MODEL = "model_name_or_path: ./m"
ENDINGS = (".json", ".jsonl", ".csv", ".json.gz")
RECORD = b'{"prompt": "Who?", "target_new": "a", "locality_prompt": ["b"], "locality_ground_truth": "c"}'


def seeds(place: Place, name: str) -> list[bytes]:
    """Valid inputs to begin with; their first byte says which kind of file the rest is."""
    files = {
        "data": [b"\0[" + RECORD + b"]", b"\1" + RECORD + b"\n", b'\2prompt,target_new\n"Who?",a\n'],
        "config": ["\n".join([MODEL, *VALID[i : i + 2]]).encode() for i in range(1, len(VALID), 2)],
        "model": [b"\0" + place.files["config.json"], b"\1" + place.files["model.safetensors"]],
        "tokens": [bytes([i]) + "Who?\nMira\né \n s".encode() for i in range(len(place.tokenizers))],
        "delta": [place.delta],
    }
    return files[name]


def decode(place: Place, name: str, raw: bytes) -> Any:
    """Bytes -> what the target's check takes."""
    kind, rest = (raw[0], raw[1:]) if raw else (0, b"")
    if name == "data":
        return ("data" + ENDINGS[kind % 4], rest), ("keep", "last", "error")[kind // 4 % 3], None
    if name == "config":
        return raw, []
    if name == "model":
        return {**place.files, ("config.json", "model.safetensors")[kind % 2]: rest}
    if name == "tokens":
        lines = [*rest.decode("utf-8", "ignore")[:60].split("\n"), "a"]
        pairs = list(zip(lines[::2], lines[1::2], strict=False))
        return sorted(place.tokenizers)[kind % len(place.tokenizers)], pairs, kind >= 128
    return raw


def main() -> None:
    name = sys.argv.pop(1)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    place = make_place(root, conftest.write_model, conftest.write_tokenizer(root / "tokenizer"))
    check: Callable[[Place, Any], bool] = make_targets(place)[name].check
    corpus = root / "corpus"
    corpus.mkdir()
    for i, raw in enumerate(seeds(place, name)):
        (corpus / str(i)).write_bytes(raw)
    counts = [0, 0]

    def one(raw: bytes) -> None:
        counts[1] += check(place, decode(place, name, raw))
        counts[0] += 1

    said = "atheris: {}: {:,} inputs checked, {:,} of them accepted"
    atexit.register(lambda: print(said.format(name, *counts)))
    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Fuzzing with hypothesis: a seeded few hundred inputs in every run of the tests, or

LOCFT_FUZZ=100000 python -m pytest tests/fuzz      that many in all, counted as they are checked
LOCFT_FUZZ_SEED=7                                  other inputs
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parent))
from targets import Place, make_place, make_targets  # noqa: E402

TOTAL = int(os.environ.get("LOCFT_FUZZ", 400))
SEED = int(os.environ.get("LOCFT_FUZZ_SEED", 0))
CHUNK = 2000  # inputs of one hypothesis run, which remembers all of them
COUNTS: Counter[str] = Counter()
ACCEPTED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def place(make_model: Any, tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("fuzz"), make_model, tiny_tokenizer_dir)


@pytest.mark.parametrize("name", ["data", "config", "model", "tokens", "delta", "tokenizer"])
def test_fuzz(place: Place, capsys: pytest.CaptureFixture[str], name: str) -> None:
    target = make_targets(place)[name]
    wanted = round(TOTAL * target.share)
    options = {
        "database": None,
        "deadline": None,
        "derandomize": False,  # seeded below
        "phases": [Phase.generate, Phase.shrink],
        "suppress_health_check": list(HealthCheck),
    }
    chunk = 0
    while COUNTS[name] < wanted:

        @seed(1000 * SEED + chunk)
        @settings(max_examples=min(CHUNK, wanted - COUNTS[name]), **options)
        @given(target.strategy)
        def one(value: Any) -> None:
            ACCEPTED[name] += target.check(place, value)
            COUNTS[name] += 1

        one()
        chunk += 1
    assert 0 < ACCEPTED[name] < COUNTS[name] or COUNTS[name] < 40  # both ways are taken
    if "LOCFT_FUZZ" in os.environ:
        with capsys.disabled():
            print(
                f"\nfuzz: {name}: {COUNTS[name]:,} inputs checked, {ACCEPTED[name]:,} of them accepted; "
                f"{COUNTS.total():,} inputs in all",
                flush=True,
            )

"""How long `locft edit` takes to say what is wrong, or how it is used: whole processes, median of a few runs.

    python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import finish, hardware

COMMANDS = {
    "a misspelt key": ["learning_rte=1e-3"],
    "a bad value": ["num_epochs=many"],
    "--help": ["--help"],
    "--help-keys": ["--help-keys"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "locft_jax.edit", *arguments], capture_output=True, check=False)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="once, for a test")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args(argv)
    rows = {}
    for name, arguments in COMMANDS.items():
        seconds(arguments)  # warms the disk
        rows[name] = statistics.median(seconds(arguments) for _ in range(1 if args.small else args.repeats))
        print(f"{name:16} {rows[name]:.2f} s")
    finish({"benchmark": "startup", "hardware": hardware(), "seconds": rows}, args.out)


if __name__ == "__main__":
    main()

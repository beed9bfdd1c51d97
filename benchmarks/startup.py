"""How soon ``simexplain --help`` answers, beside a bare ``import torch``.

Both run as whole processes and take turns; the ratio is within each round.

    python benchmarks/startup.py --rounds 7
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

HELP = [sys.executable, "-m", "simexplain", "--help"]
IMPORT = [sys.executable, "-c", "import torch"]
LIMIT = 0.4


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def ratios(rounds: int) -> list[float]:
    """Help over import, one for each round, after a first one that warms the disk cache."""
    seconds(HELP), seconds(IMPORT)
    return [seconds(HELP) / seconds(IMPORT) for _ in range(rounds)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    result = ratios(parser.parse_args(arguments).rounds)
    kept = "kept" if median(result) < LIMIT else "missed"
    spread = f"{median(result):.2f} [{min(result):.2f}..{max(result):.2f}]"
    print(f"simexplain --help / import torch: {spread}, promised below {LIMIT}: {kept}")


if __name__ == "__main__":
    main()

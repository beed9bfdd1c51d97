"""Runs the numeric tests as they would run on other processors, with one thread and with two.

``python tests/portable.py`` runs every setting, ``python tests/portable.py avx2 sse`` those named;
with ``--keep`` the outcome goes to the record of the page on reliability.
A setting limits what oneDNN and PyTorch's own kernels may use, or how MKL sums; what this processor
lacks cannot be switched on, so the settings only go down from what is there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "own": {"OMP_NUM_THREADS": "2"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1",
    },
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
    "sse": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2",
    },
    "default-one-thread": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"},
}  # fmt: skip
"""What each setting puts into the environment of the tests."""

NUMERIC = (
    "alone", "batch", "cli_batch", "focus", "matching", "position_parts", "similarity_methods",
    "tracing",
)  # fmt: skip
"""The test files whose assertions are about numbers that kernels round."""


def main(names: list[str], *, keep: bool = False) -> int:
    """Runs the settings of these names, or all; the number of those that failed."""
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        print(f"Expected settings among {', '.join(SETTINGS)}, got {', '.join(unknown)}.")
        return 2
    folder = Path(__file__).parent
    files = [str(folder / f"test_{name}.py") for name in NUMERIC]
    failed, rows = [], []
    for name in names or SETTINGS:
        settings, began = SETTINGS[name], time.monotonic()
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        print(f"== {name}: {shown}", flush=True)
        # Threads that wait for the next of many small tensors shall sleep, not take a processor
        # from the other worker.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | settings
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "2", *files],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        print(done.stdout, end="", flush=True)
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] if done.returncode else []
        last = re.sub(r"(, \d+ warnings?)? in .*", "", done.stdout.strip().splitlines()[-1]).strip(
            "= "
        )
        rows.append([name, f"`{shown}`", last])
    if keep:
        sys.path.insert(0, str(folder.parent / "benchmarks"))
        import store

        store.keep("reliability", store.load("reliability") | {"portable": {"rows": rows}})
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return len(failed)


if __name__ == "__main__":
    named = [name for name in sys.argv[1:] if name != "--keep"]
    sys.exit(main(named, keep="--keep" in sys.argv))

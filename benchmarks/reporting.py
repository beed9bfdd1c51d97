"""What several benchmarks share: the memory that a call adds, and where a page goes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def added_memory(run: Callable[[], object]) -> float | None:
    """MiB that one call adds to the resident set of this process; None if not told."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
        before = _kibibytes(status.read_text(), "VmRSS")
        run()
        return (_kibibytes(status.read_text(), "VmHWM") - before) / 1024
    except OSError:
        return None


def _kibibytes(status: str, field: str) -> int:
    result = re.search(rf"{field}:\s+(\d+)", status)
    if not result:
        raise OSError(f"{field} is not in the status of the process.")
    return int(result[1])


def publish(text: str, out: Path | None) -> None:
    """Writes a page to a file; prints it where no file is named."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    else:
        print(text)

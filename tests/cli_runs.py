"""Runs of the command line in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FAST = ("--untrained", "--size", "64")
NETWORK = "timm:resnet18"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def simexplain(*arguments: object, cwd: Path, script: bool = False) -> Run:
    """One run; nothing that it prints may ever look like a traceback."""
    start = [str(Path(sys.executable).with_name("simexplain"))]
    if not script:
        start = [sys.executable, "-m", "simexplain"]
    done = subprocess.run(
        [*start, *map(str, arguments)],
        capture_output=True, encoding="utf-8", cwd=cwd, timeout=300, env=environment(),
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def interrupted(*arguments: object, cwd: Path, seconds: float) -> Run:
    """A run that is stopped with Ctrl-C after so long; it must not have ended before."""
    started = subprocess.Popen(
        [sys.executable, "-m", "simexplain", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment(),
        # A shell's background jobs ignore Ctrl-C, and hand that on to all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(seconds)
    assert started.poll() is None, "it ended before it could be interrupted"
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=120)
    assert "Traceback" not in err
    # Python ends itself by the signal where that struck inside exec(), whatever the code does then;
    # to a shell the two are the same.
    code = 130 if started.returncode == -signal.SIGINT else started.returncode
    return Run(code, out, err)


def environment() -> dict[str, str]:
    """Few threads, since tests share the machine, and no debugging switch left on."""
    kept = {key: value for key, value in os.environ.items() if key != "SIMEXPLAIN_DEBUG"}
    return kept | {"OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8"}

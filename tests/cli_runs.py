"""Runs of the command line and of benchmarks, in this process or in processes of their own."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO
from unittest import mock

import pytest
import torch
from simexplain_cli.main import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAST = ("--untrained", "--size", "64")
NETWORK = "timm:test_resnet"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python does not print unless it is told to."""


@contextmanager
def caught(number: int) -> Iterator[TextIO]:
    """What is written to a file descriptor meanwhile, by Python or by any library below it."""
    kept = os.dup(number)
    with TemporaryFile("w+", encoding="utf-8", newline="") as file:
        os.dup2(file.fileno(), number)
        try:
            yield file
        finally:
            os.dup2(kept, number)
            os.close(kept)


def simexplain(*arguments: object, cwd: Path | None = None) -> Run:
    """One run in this process, which spares the import of torch, with the output of one alone."""
    here = Path.cwd()
    with (
        caught(1) as out, caught(2) as err, redirect_stdout(out), redirect_stderr(err),
        mock.patch.object(sys, "argv", ["simexplain", *map(str, arguments)]),
        warnings.catch_warnings(record=True) as noticed,
    ):  # fmt: skip
        os.chdir(cwd or here)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            os.chdir(here)
        for one in noticed:
            if not issubclass(one.category, SILENT):
                # Not showwarning(), which would note it once more.
                sys.stderr.write(
                    warnings.formatwarning(one.message, one.category, one.filename, one.lineno)
                )
        texts = []
        for file in (out, err):
            file.flush()
            file.seek(0)
            texts.append(file.read())
    assert "Traceback" not in texts[0] + texts[1], texts[1]
    return Run(int(ended.value.code or 0), *texts)


def benchmark(name: str, *arguments: object) -> str:
    """What a script among the benchmarks prints, run in this process; it may set the threads."""
    threads = torch.get_num_threads()
    with (
        mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]),
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
        redirect_stdout(StringIO()) as out,
    ):
        try:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
    return out.getvalue()


def process(*arguments: object, cwd: Path, script: bool = False) -> Run:
    """One run in a process of its own; nothing that it prints may ever look like a traceback."""
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
    """One thread, since tests share the processors, and no debugging switch left on."""
    kept = {key: value for key, value in os.environ.items() if key != "SIMEXPLAIN_DEBUG"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}

"""What code from a file would give itself away by: imports, sockets, commands, files written."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "ctypes.dlopen",
    "socket.",
    "shutil.",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
)
_OF_TORCH = ("libnvidia-ml.so.1",)
"""The library by which torch counts graphics cards, which it may do at any time."""
_watching: list[list[str]] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or (event == "ctypes.dlopen" and arguments == _OF_TORCH):
        return
    # Python's parser alone, which runs nothing, is used under the name <unknown>.
    signs = (
        event.startswith(_EVENTS),
        event == "import" and arguments[0] not in sys.modules,
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"),
        event == "compile" and "sprung" in str(arguments[0]) and arguments[1] != "<unknown>",
    )
    if any(signs):
        _watching[-1].append(f"{event} {arguments}"[:300])


sys.addaudithook(_heard)  # which cannot be taken away again


@contextmanager
def watched() -> Iterator[list[str]]:
    """Inside: whatever happens that no loading of tensors needs."""
    events: list[str] = []
    plain = importlib.import_module

    def recorded(name: str, package: str | None = None) -> Any:
        if name not in sys.modules:
            events.append(f"importlib.import_module {name}")
        return plain(name, package)

    importlib.import_module = recorded
    _watching.append(events)
    try:
        yield events
    finally:
        _watching.pop()
        importlib.import_module = plain

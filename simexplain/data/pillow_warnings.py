"""Silences Pillow's warnings, in any number of threads, and leaves Python's filters as before."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_RULE = ("ignore", None, Warning, re.compile(r"PIL(\.|$)"), 0)
_LOCK = threading.Lock()
_inside = 0
_changed: list[list[Any]] = []


@contextmanager
def pillow_quiet() -> Iterator[None]:
    """Silences warnings that Pillow gives, of damaged metadata for example.

    ``warnings.catch_warnings`` saves and restores the filters of the whole process: where two
    threads do so at a time, the last to leave may restore what the other had set, for good. Here
    one rule, of Pillow's modules alone, is put in by the first thread that comes and taken out by
    the last that leaves, of every list of filters that was in use meanwhile.
    """
    global _inside
    with _LOCK:
        _inside += 1
        _put_in()
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _take_out()


def _put_in() -> None:
    present: list[Any] = _filters()
    if _RULE in present:
        return
    # Nothing but a rule is added, and what is ignored is never remembered by Python, so that
    # its caches of earlier decisions need no renewal.
    present.insert(0, _RULE)
    if not any(known is present for known in _changed):
        _changed.append(present)


def _take_out() -> None:
    for filters in (*_changed, _filters()):  # a caller's own catch_warnings copies the list
        while _RULE in filters:
            filters.remove(_RULE)
    _changed.clear()


def _filters() -> list[Any]:
    return warnings.filters  # type: ignore[return-value]

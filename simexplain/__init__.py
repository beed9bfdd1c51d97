"""simexplain: why does this model say these images are alike?

The names are listed in ``__init__.pyi``. Each is imported when it is first used, so that
``import simexplain`` is instant.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_lazy, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]


def __getattr__(name: str) -> Any:
    if name in _names:
        return _lazy(name)
    from simexplain.renaming import old_public

    return old_public(name)


def __dir__() -> list[str]:
    return sorted(__all__)

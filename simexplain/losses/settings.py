"""Settings of losses by name: whether they exist, and are of the kind that is meant."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from simexplain.errors import ModelError, SimexplainError

_KINDS = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a name"}


def check_kind(
    name: str, value: object, kind: Any, error: type[SimexplainError] = ModelError
) -> None:
    """Refuses a value of another kind than the setting's.

    Args:
        name: Of the setting.
        value: What was given.
        kind: Its type: ``float``, which whole numbers are too, ``int``, ``bool`` or ``str``, or
            such a type or None. Any other type is not looked at.
        error: What to raise.

    Raises:
        SimexplainError: Of the kind ``error``, if it is of another kind or not finite.
    """
    kinds = get_args(kind) or (kind,)
    known = [one for one in kinds if one in _KINDS]
    if not known or (value is None and type(None) in kinds):
        return
    if not any(_is(value, one) for one in known):
        what = " or ".join(_KINDS[one] for one in known)
        raise error(f"Expected {name} to be {what}, got {value!r}; give it such a value.")


def _is(value: object, kind: type) -> bool:
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_settings(name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuses settings that a loss does not have, or of another kind than it wants.

    Args:
        name: Of the loss.
        factory: Makes it; its keyword-only parameters are the settings.
        given: The settings. Where the value is a list or tuple, each of its parts is looked at.

    Raises:
        ModelError: If there is one.
    """
    known = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    if unknown := [setting for setting in given if setting not in known]:
        raise ModelError(
            f"Expected settings of loss '{name}' among {', '.join(known)}, got {unknown[0]!r}."
        )
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for setting, value in given.items():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            check_kind(f"{setting} of loss '{name}'", part, hints.get(setting))

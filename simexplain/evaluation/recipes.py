"""Which methods to put side by side: from names and short texts to recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any

from simexplain.errors import ComparisonError, SimexplainError, meant
from simexplain.methods import ELSEWHERE, METHODS, MethodLike, option_from, options_of
from simexplain.methods.rows import Layers
from simexplain.renaming import todays

Recipe = tuple[str | MethodLike, Layers, Mapping[str, Any]]
"""A method, its layers and its options, as ``explain`` takes them."""

Recipes = Mapping[str, Recipe] | Sequence[str] | None
"""Recipes by name, texts as :func:`recipe_from` takes them, or None for :func:`quick_methods`."""

_QUICK = ("sam", "focus", "similarity_cam", "decomposition", "attention_relevance", "avsl")
_OF_THE_VIEW = ("upscale", "scale")


def quick_methods() -> tuple[str, ...]:
    """What is compared unless methods are named: those that need a pass or two."""
    return tuple(name for name in METHODS if name in _QUICK)


def recipes_of(methods: Recipes) -> dict[str, Recipe]:
    """Recipes by name, whatever they were given as.

    Raises:
        ComparisonError: If a method or an option is unknown, or there is none or one given twice.
    """
    if isinstance(methods, Mapping):
        recipes = dict(methods)
        for method, _, options in recipes.values():
            if isinstance(method, str):
                _check_options(method, options)
    else:
        texts = quick_methods() if methods is None else tuple(methods)
        recipes = {text: recipe_from(text) for text in texts}
        if len(recipes) != len(texts):
            raise ComparisonError(f"Expected every method once, got {', '.join(texts)}.")
    if not recipes:
        raise ComparisonError("Expected at least one method, got none.")
    return recipes


def recipe_from(text: str) -> Recipe:
    """A recipe from ``NAME[@LAYER+LAYER][:OPTION=VALUE,...]``, such as ``sam:weights=signed``.

    Values are read as what the option is by default: a number, true or false, else text. Besides
    its own options every method takes ``upscale``.

    Raises:
        ComparisonError: If the method, an option or a value does not fit.
    """
    head, colon, tail = text.partition(":")
    name, at, layers = head.partition("@")
    _check_options(name, {})
    defaults = {"upscale": 1.0, **{field.name: _default(field) for field in _fields(name)}}
    options: dict[str, Any] = {}
    for pair in tail.split(",") if colon else ():
        option, equals, value = pair.partition("=")
        ((option, value),) = todays({option: value}, defaults).items()
        if not equals or option not in defaults:
            raise ComparisonError(
                f"Expected OPTION=VALUE with an option of {name} ({', '.join(defaults)}), got "
                f"'{pair}' in '{text}'."
            )
        if option in options:
            raise ComparisonError(f"Expected every option once, got '{option}' twice in '{text}'.")
        options[option] = option_from(defaults[option], option, value)
    chosen = tuple(layers.split("+"))
    if at and not all(chosen):
        raise ComparisonError(f"Expected a layer after '@' in '{text}'.")
    return name, (chosen if len(chosen) > 1 else chosen[0]) if at else None, options


def ready(recipe: Recipe) -> str:
    """Why a recipe cannot be carried out whatever the model; empty where nothing is known."""
    method, _, options = recipe
    missing = _missing(method, options)
    if not isinstance(method, str) or not missing:
        return ""
    try:
        METHODS[method]()
    except SimexplainError as error:
        return str(error)
    except TypeError:
        pass
    return f"It needs the option {missing[0]}, which has no default."


def settled(recipe: Recipe) -> Recipe:
    """The recipe with its options checked and as the method keeps them: files are read once.

    A bank given by its file, for one, becomes the bank with that name.

    Raises:
        SimexplainError: If an option has a value that the method does not take.
    """
    method, layer, options = recipe
    own = {name: value for name, value in options.items() if name not in _OF_THE_VIEW}
    if not own or not isinstance(method, str) or _missing(method, options):
        return recipe
    made: Any = METHODS[method](**own)
    kept = {name: getattr(made, name, value) for name, value in own.items()}
    return method, layer, {**options, **kept}


def _missing(method: str | MethodLike, options: Mapping[str, Any]) -> list[str]:
    """Options that have to be given and are not."""
    return [
        field.name
        for field in (_fields(method) if isinstance(method, str) else ())
        if _default(field) is MISSING and field.name not in options
    ]


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    if name not in METHODS:
        hint = meant(name, METHODS, ELSEWHERE) or "."
        raise ComparisonError(f"Expected methods of {', '.join(METHODS)}, got '{name}'{hint}")
    known = [*_OF_THE_VIEW, *(field.name for field in _fields(name))]
    for option in options:
        if option not in known:
            raise ComparisonError(
                f"Method '{name}' has the options {', '.join(known)}, got '{option}'."
            )


def _fields(name: str) -> tuple[Field[Any], ...]:
    return tuple(field for field in options_of(METHODS[name]) if field.init)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default

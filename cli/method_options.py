"""What ``explain`` and ``batch`` share: the method that makes maps, and its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from simexplain.errors import ComparisonError
from simexplain.explanation import SCALES
from simexplain.methods import METHODS, option_from, options_of
from simexplain.methods.cams import CAMS
from simexplain.methods.weights import WEIGHTS

from .options import OneOf

if TYPE_CHECKING:
    from simexplain.models.base import SimilarityModel

F = TypeVar("F", bound=Callable[..., Any])

_OWN_OPTIONS = ("weights", "cam", "through_weights", "keep_negative")
"""Options of the default method that have a name of their own here."""
_OPTIONS = (
    click.option(
        "--method",
        type=OneOf(list(METHODS)),
        metavar="NAME",
        multiple=True,
        help=f"One of {', '.join(METHODS)}; repeat for several rows. [sam as published and "
        "focus, or sam alone where one of its options or a layer is given]",
    ),
    click.option(
        "--layer", multiple=True, help="Layer to explain; repeat to multiply several layers' maps."
    ),
    click.option("--sweep", is_flag=True, help="Explain the last layer of every resolution."),
    click.option(
        "--weights",
        type=OneOf(list(WEIGHTS)),
        default="paper",
        show_default=True,
        help="; ".join(f"{name}: {rule.about}" for name, rule in WEIGHTS.items()) + ".",
    ),
    click.option(
        "--cam", type=OneOf(list(CAMS)), multiple=True, help="Formula; once, or per layer."
    ),
    click.option("--through-weights", is_flag=True, help="Gradient through the weights as well."),
    click.option("--keep-negative", is_flag=True, help="Keep negative evidence in the saved maps."),
    click.option(
        "--option", "more", metavar="NAME=VALUE", multiple=True,
        help="Any option of the method, such as score=held; repeat.",
    ),
    click.option("--magnify", default=1.0, show_default=True,
                 help="Enlarge the images, finer maps."),
    click.option("--scale", type=OneOf(SCALES), default="image", show_default=True,
                 help="Full heat: each image's own maximum, or one shared by all."),
)  # fmt: skip


def method_options(command: F) -> F:
    """Adds everything that :func:`method_from` wants."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def method_from(network: SimilarityModel, given: dict[str, Any]) -> dict[str, Any]:
    """What was given, with these options as ``explain_files`` has them.

    Raises:
        click.UsageError: If the method has no such option, or not with such a value; or layers are
            named and all are asked for.
    """
    if given["sweep"] and given["layer"]:
        raise click.UsageError("--sweep takes layers of its own; say it or --layer.")
    layer = network.stages if given.pop("sweep") else given["layer"] or None
    names = given["cam"]
    given.update(cam=names[0] if len(names) == 1 else names, layer=layer)
    return _for_method(given)


def _for_method(given: dict[str, Any]) -> dict[str, Any]:
    """Leaves options out that no method has, or that were not given on purpose."""
    context = click.get_current_context()
    named: tuple[str, ...] = given["method"]
    for name in _OWN_OPTIONS:
        if context.get_parameter_source(name) is ParameterSource.DEFAULT:
            del given[name]
    fields = {
        field.name: field for name in named or ("sam",) for field in options_of(METHODS[name])
    }
    for pair in given.pop("more"):
        name, equals, text = pair.partition("=")
        if not equals or name not in fields:
            raise click.BadParameter(
                f"expected NAME=VALUE with an option of {', '.join(named) or 'sam'} "
                f"({', '.join(fields)}), got {pair!r}.",
                param_hint="--option",
            )
        try:
            given[name] = option_from(fields[name].default, name, text)
        except ComparisonError as error:
            raise click.BadParameter(str(error), param_hint="--option") from error
    given["method"] = named[0] if len(named) == 1 else named or None
    return given

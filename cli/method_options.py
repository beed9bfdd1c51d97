"""What ``explain`` and ``batch`` share: the method that makes maps, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from simexplain.errors import ComparisonError
from simexplain.evaluation.comparing import MethodSetup, setup_from
from simexplain.explanation import SCALES
from simexplain.methods import METHODS, option_from, options_of
from simexplain.methods.cams import CAMS
from simexplain.methods.similarity_attention import WEIGHTS

from .options import OneOf

if TYPE_CHECKING:
    from simexplain.models.base import SimilarityModel

F = TypeVar("F", bound=Callable[..., Any])


class MethodText(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A method with its layers and options, such as ``sam@blocks.6:weights=signed``."""

    name = "NAME[@LAYER+LAYER][:OPTION=VALUE,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, which can be read."""
        try:
            setup_from(str(value))
        except ComparisonError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names of methods."""
        return [CompletionItem(name) for name in METHODS if name.startswith(incomplete)]


METHOD_HELP = (
    "Method that makes the maps: NAME is one of "
    f"{', '.join(METHODS)}; for example sam@blocks.6:weights=signed"
)
"""What ``--method`` is in every command."""

_OWN_OPTIONS = ("weights", "cam", "through_weights", "keep_negative")
"""Options of the default method that have a name of their own here."""
_OPTIONS = (
    click.option(
        "--method",
        type=MethodText(),
        multiple=True,
        help=f"{METHOD_HELP}; repeat for several rows. [sam as published and focus, or sam alone "
        "where one of its options or a layer is given]",
    ),
    click.option(
        "--layer", multiple=True,
        help="Layer of the maps; repeat to multiply those of several. [the method's default]",
    ),
    click.option("--sweep", is_flag=True, help="Explain the last layer of every resolution."),
    click.option(
        "--weights",
        type=OneOf(list(WEIGHTS)),
        default="paper",
        show_default=True,
        help="Rule for the weights of sam. "
        + "; ".join(f"{name}: {rule.about}" for name, rule in WEIGHTS.items()) + ".",
    ),
    click.option(
        "--cam", type=OneOf(list(CAMS)), multiple=True,
        help="CAM formula that weighs the channels; once, or for each layer."
    ),
    click.option("--through-weights", is_flag=True,
        help="Let the gradient of sam pass through its weights.",
    ),
    click.option("--keep-negative", is_flag=True, help="Keep negative evidence in the saved maps."),
    click.option(
        "--option", "more", metavar="NAME=VALUE", multiple=True,
        help="Option of the method, such as score=held; repeat.",
    ),
    click.option("--upscale", default=1.0, show_default=True,
                 help="Enlarge the images, for finer maps."),
    click.option("--scale", type=OneOf(SCALES), default="image", show_default=True,
                 help="Full heat is each image's own maximum, or one shared by all."),
)  # fmt: skip


def method_options(command: F) -> F:
    """Adds everything that :func:`method_from` wants."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def method_from(network: SimilarityModel, given: dict[str, Any]) -> dict[str, Any]:
    """What was given, with these options as ``explain`` has them.

    Raises:
        click.UsageError: If the method has no such option or value, or layers are named and all are
        requested.
    """
    if given["sweep"] and given["layer"]:
        raise click.UsageError("--sweep takes layers of its own; say it or --layer.")
    sweep = given.pop("sweep")
    recipes = [setup_from(text) for text in given["method"]]
    names = given["cam"]
    given.update(cam=names[0] if len(names) == 1 else names, layer=given["layer"] or None)
    given = _for_method(given, [str(name) for name, _, _ in recipes])
    given |= _of_recipes(recipes, given)
    return {**given, "layer": network.stages} if sweep else given


def _of_recipes(recipes: Sequence[MethodSetup], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options inside ``--method``, as arguments of ``explain``.

    Raises:
        click.BadParameter: If one is given twice, or methods would differ in an option that they
        share.
    """
    if len(recipes) == 1:
        ((name, layer, options),) = recipes
        twice = [option for option in options if option in given and option != "upscale"]
        if twice or (layer and given["layer"]):
            what = twice[0] if twice else "layer"
            raise click.BadParameter(
                f"{what} is given twice; leave one out.", param_hint="--method"
            )
        return {"method": name, **({"layer": layer} if layer else {}), **options}
    if any(layer or "upscale" in options for _, layer, options in recipes):
        raise click.BadParameter(
            "several methods share their layers and their upscale; say --layer and --upscale, or "
            "use compare.",
            param_hint="--method",
        )
    made = [METHODS[str(name)](**options) if options else name for name, _, options in recipes]
    return {"method": made or None}


def _for_method(given: dict[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """Leaves options out that no method has, or that were not given on purpose."""
    context = click.get_current_context()
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
    return given

"""What ``explain`` and ``batch`` share: the method that makes maps, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from simexplain.errors import ComparisonError
from simexplain.evaluation.comparing import (
    MethodSetup,
    quick_methods,
    settled,
    setup_from,
    setups_of,
)
from simexplain.evaluation.faithfulness import PERTURBATIONS
from simexplain.explanation import SCALES
from simexplain.methods import METHODS, option_from, options_of
from simexplain.methods.cams import CAMS
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.metrics.curves import BASELINES

from .console import echo
from .options import OneOf, field_options, option, rare_option, together

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
_of_method = partial(rare_option, group="Method")
method_options = together(
    option(
        "--method",
        type=MethodText(),
        multiple=True,
        help=f"{METHOD_HELP}; repeat for several rows. [sam as published and focus, or sam alone "
        "where one of its options or a layer is given]",
    ),
    option(
        "--layer", multiple=True,
        help="Layer of the maps; repeat to multiply those of several. [the method's default]",
    ),
    _of_method("--sweep", is_flag=True, help="Explain the last layer of every resolution."),
    field_options(SimilarityAttention, "weights"),
    _of_method(
        "--cam", type=OneOf(list(CAMS)), multiple=True,
        help="CAM formula that weighs the channels; once, or for each layer."
    ),
    field_options(SimilarityAttention, "through_weights", "keep_negative"),
    _of_method(
        "--option", "more", metavar="NAME=VALUE", multiple=True,
        help="Option of the method, such as score=held; repeat.",
    ),
    _of_method("--upscale", default=1.0, show_default=True,
        help="Enlarge the images, for finer maps."),
    _of_method("--scale", type=OneOf(SCALES), default="image", show_default=True,
        help="Full heat is each image's own maximum, or one shared by all."),
)  # fmt: skip
"""Everything that :func:`method_from` wants."""


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
        ((method, layer, options),) = recipes
        twice = [name for name in options if name in given and name != "upscale"]
        if twice or (layer and given["layer"]):
            what = twice[0] if twice else "layer"
            raise click.BadParameter(
                f"{what} is given twice; leave one out.", param_hint="--method"
            )
        return {"method": method, **({"layer": layer} if layer else {}), **options}
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


_LONG = 30
"""Seconds from which on the expected duration is announced."""


_of_measuring = partial(rare_option, group="Measuring")
measuring_options = together(
    option(
        "--method", "methods", type=MethodText(), multiple=True,
        help=f"{METHOD_HELP}; repeat. [those of {', '.join(quick_methods())} that apply]",
    ),
    option("--all", "every", is_flag=True,
        help="Take every method that applies; some are slow."),
    _of_measuring("--curve-steps", default=20, show_default=True, type=click.IntRange(2),
        help="How many steps deletion and insertion take."),
    _of_measuring("--baseline", type=OneOf(list(BASELINES)), default="blur",
        show_default=True, help="What deleted pixels become."),
    _of_measuring("--perturb", type=OneOf(PERTURBATIONS), default="single", show_default=True,
        help="How pixels are deleted. single: from one image while the others are held; "
                 "joint: from all at once."),
    _of_measuring("--tolerance", default=0.0, show_default=True, type=click.FloatRange(0),
        help="Pixels around a mask that still count as hits."),
    _of_measuring("--batch-size", "max_batch", type=click.IntRange(1),
        help="Pictures in one forward pass. [as many as fit together]"),
    _of_measuring("--seed", default=0, show_default=True, help="Random seed."),
)  # fmt: skip
"""The choice of methods and how they are measured."""


def tell_long_work(seconds: float) -> None:
    """Says how much longer it will take, where that is worth knowing."""
    if seconds > _LONG:
        echo(
            f"About {seconds:.0f} s more, judged by the first; fewer --method or --curve-steps are "
            "quicker.",
            err=True,
        )


def asked_recipes(given: dict[str, Any]) -> dict[str, MethodSetup]:
    """Takes ``methods`` and ``every`` out of ``given``: the recipes to run.

    Raises:
        click.BadParameter: If a method or an option is unknown or has a wrong value.
    """
    texts, every = given.pop("methods"), given.pop("every")
    if every:
        texts = (*texts, *(name for name in METHODS if name not in texts))
    try:
        recipes = setups_of(texts or None)
        return {name: settled(recipe) for name, recipe in recipes.items()}
    except ComparisonError as error:
        raise click.BadParameter(str(error), param_hint="--method") from error

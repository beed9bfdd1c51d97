"""What commands share that put several methods side by side: which ones, and how to measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from simexplain.errors import ComparisonError
from simexplain.evaluation.comparing import MethodSetup, quick_methods, settled, setups_of
from simexplain.evaluation.faithfulness import PERTURBATIONS
from simexplain.methods import METHODS
from simexplain.metrics.curves import BASELINES

from .console import echo
from .method_options import METHOD_HELP, MethodText
from .options import OneOf

_LONG = 30
"""Seconds from which on the expected duration is announced."""

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--method", "methods", type=MethodText(), multiple=True,
        help=f"{METHOD_HELP}; repeat. [those of {', '.join(quick_methods())} that apply]",
    ),
    click.option("--all", "every", is_flag=True,
                 help="Take every method that applies; some are slow."),
    click.option("--curve-steps", "steps", default=20, show_default=True, type=click.IntRange(2),
                 help="How many steps deletion and insertion take."),
    click.option("--baseline", type=OneOf(list(BASELINES)), default="blur",
                 show_default=True, help="What deleted pixels become."),
    click.option("--perturb", type=OneOf(PERTURBATIONS), default="single", show_default=True,
                 help="How pixels are deleted. single: from one image while the others are held; "
                 "joint: from all at once."),
    click.option("--tolerance", default=0.0, show_default=True, type=click.FloatRange(0),
                 help="Pixels around a mask that still count as hits."),
    click.option("--batch-size", "max_batch", type=click.IntRange(1),
                 help="Pictures in one forward pass. [as many as fit together]"),
    click.option("--seed", default=0, show_default=True, help="Random seed."),
)  # fmt: skip


def measuring_options(command: F) -> F:
    """Adds the choice of methods and how they are measured."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


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

"""What an image is explained against in place of other images: texts, vectors, folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from simexplain.data.arrays import read_vectors
from simexplain.errors import ComparisonError
from simexplain.explaining import centroid, explain_against

if TYPE_CHECKING:
    from torch import Tensor

    from simexplain.explanation import Explanation
    from simexplain.models.base import SimilarityModel

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = {
    "text": ("TEXT", "Text that the image should be like, through the text tower of MODEL"),
    "vector": ("FILE", "Vectors it should be like: .npy, .npz, .safetensors or .json"),
    "class_folder": ("DIR", "Folder whose mean embedding it should be near"),
}


def vector_options(command: F) -> F:
    """Adds everything that :func:`vectors_from` wants."""
    command = click.option(
        "--direction",
        metavar="FILE",
        help="File of one vector as a direction: the score is f . d, with its sign.",
    )(command)
    for name, (metavar, what) in reversed(_KINDS.items()):
        flag = name.replace("_", "-")
        command = click.option(
            f"--not-{flag}",
            metavar=metavar,
            multiple=True,
            help=f"As --{flag}, for what it should not be like; repeat.",
        )(command)
        command = click.option(
            f"--{flag}", metavar=metavar, multiple=True, help=f"{what}; repeat."
        )(command)
    return command


@dataclass(frozen=True)
class Sources:
    """Where the vectors come from.

    Attributes:
        positives: For each kind (``text``, ``vector``, ``class_folder``) what was given.
        negatives: Likewise.
        direction: The file of a direction, or None.
    """

    positives: dict[str, tuple[str, ...]]
    negatives: dict[str, tuple[str, ...]]
    direction: str | None

    def __bool__(self) -> bool:
        sides = [*self.positives.values(), *self.negatives.values()]
        return bool(self.direction or any(sides))

    def explain(self, model: SimilarityModel, path: str, given: dict[str, Any]) -> Explanation:
        """The picture at ``path`` explained against these vectors, with the method's options.

        Raises:
            SimexplainError: If a vector cannot be had or does not fit.
        """
        if self.direction:
            vectors = read_vectors(self.direction)
            return explain_against(model, path, vectors, direction=True, **given)
        near, far = (_vectors(model, side) for side in (self.positives, self.negatives))
        return explain_against(model, path, near, far, **given)


def vectors_from(given: dict[str, Any]) -> Sources:
    """Takes the options of :func:`vector_options` out of ``given``.

    Raises:
        click.UsageError: If a direction is given beside something else.
    """
    near = {kind: given.pop(kind) for kind in _KINDS}
    far = {kind: given.pop(f"not_{kind}") for kind in _KINDS}
    sources = Sources(near, far, given.pop("direction"))
    if sources.direction and (any(near.values()) or any(far.values())):
        raise click.UsageError("--direction is a score by itself; leave the other vectors away.")
    return sources


def _vectors(model: SimilarityModel, side: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The vectors of one side by their labels."""
    vectors: dict[str, Tensor] = {}
    named = list(side["text"])
    if named:
        vectors.update(zip(named, model.embed_text(named).cpu(), strict=True))
    for file in side["vector"]:
        vectors.update(read_vectors(file))
    for folder in side["class_folder"]:
        vectors[f"{Path(folder).name} (mean)"] = centroid(model, folder)
    wanted = len(named) + len(side["class_folder"])
    if len(vectors) < wanted:
        raise ComparisonError(f"Expected {wanted} different texts and folders, got {len(vectors)}.")
    return vectors

"""The verb: put several methods side by side on one comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.arguments import typed
from simexplain.comparison import Comparison, arch_of
from simexplain.data.folders import Progress
from simexplain.data.preprocessing import notes_of
from simexplain.errors import ComparisonError, SimexplainError, first_line, meant
from simexplain.evaluation.faithfulness import (
    PERTURBATIONS,
    LoadedItem,
    Measures,
    controlled,
    load_item,
    timed,
)
from simexplain.evaluation.items import Item
from simexplain.evaluation.results import ComparedMethod, MethodComparison, means
from simexplain.explaining import Images, explain
from simexplain.explaining_tensors import check_images, embeddings_of, explain_tensors
from simexplain.explanation import Explanation
from simexplain.methods import ELSEWHERE, METHODS, MethodLike, option_from, options_of
from simexplain.methods.rows import Layers
from simexplain.metrics.curves import BASELINES
from simexplain.metrics.maps import grown, mean_valid
from simexplain.metrics.stability import AGREEMENTS
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model
from simexplain.networks import full_precision
from simexplain.renaming import todays

MethodSetup = tuple[str | MethodLike, Layers, Mapping[str, Any]]
"""A method, its layers and its options, as ``explain`` takes them."""

MethodSetups = Mapping[str, MethodSetup] | Sequence[str] | None
"""Methods by name, texts as :func:`setup_from` takes them, or None for :func:`quick_methods`."""

_QUICK = ("sam", "focus", "similarity_cam", "decomposition", "attention_relevance", "avsl")
_OF_THE_VIEW = ("upscale", "scale")


def quick_methods() -> tuple[str, ...]:
    """What is compared unless methods are named: those that need a pass or two."""
    return tuple(name for name in METHODS if name in _QUICK)


def setups_of(methods: MethodSetups) -> dict[str, MethodSetup]:
    """Methods with layers and options by name, whatever they were given as.

    Raises:
        ComparisonError: If a method or an option is unknown, or there is none or one given twice.
    """
    if isinstance(methods, Mapping):
        setups = dict(methods)
        for method, _, options in setups.values():
            if isinstance(method, str):
                _check_options(method, options)
    else:
        texts = quick_methods() if methods is None else tuple(methods)
        setups = {text: setup_from(text) for text in texts}
        if len(setups) != len(texts):
            raise ComparisonError(f"Expected every method once, got {', '.join(texts)}.")
    if not setups:
        raise ComparisonError("Expected at least one method, got none.")
    return setups


def setup_from(text: str) -> MethodSetup:
    """A setup from ``NAME[@LAYER+LAYER][:OPTION=VALUE,...]``, such as ``sam:weights=signed``.

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


def ready(setup: MethodSetup) -> str:
    """Why a setup cannot be carried out whatever the model; empty where nothing is known."""
    method, _, options = setup
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


def settled(setup: MethodSetup) -> MethodSetup:
    """The setup with its options checked and as the method keeps them: files are read once.

    A bank given by its file, for one, becomes the bank with that name.

    Raises:
        SimexplainError: If an option has a value that the method does not take.
    """
    method, layer, options = setup
    own = {name: value for name, value in options.items() if name not in _OF_THE_VIEW}
    if not own or not isinstance(method, str) or _missing(method, options):
        return setup
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


_AGREEMENTS = ("spearman", "cosine")
_MOST_RANKED = 112
"""Heatmaps are compared on grids of at most this side: finer ones hold nothing more."""


@typed
@full_precision()
def compare(
    model: nn.Module,
    images: Images,
    methods: MethodSetups = None,
    *,
    arch: str | None = None,
    masks: Sequence[str | Path | Tensor | None] | None = None,
    negative: bool = False,
    positives: int = 1,
    perturb: str = "single",
    curve_steps: int = 20,
    baseline: str = "blur",
    tolerance: float = 0,
    max_batch: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    estimate: Callable[[float], None] | None = None,
) -> MethodComparison:
    """Explains one comparison by several methods, and measures each of them.

    Args:
        model: A similarity model, or any ``nn.Module`` that returns an embedding.
        images: Pictures: files, pictures of PIL or arrays, with the heat on the pictures
            themselves; or one comparison (``B`` = 1) of preprocessed images ``(3,H,W)``.
        methods: Names like ``decomposition``, or texts like ``sam@blocks.6:weights=signed``
            (``NAME[@LAYER+LAYER][:OPTION=VALUE,...]``); or setups ``(method, layer, options)`` by
            name; None for :func:`quick_methods`.
        arch: Of pictures, as for ``explain``; so are ``negative`` and ``positives``.
        masks: For each image what its map should point at, or None: of pictures the file of a mask
            (see ``Item``), of tensors a boolean mask ``(H,W)``.
        negative: The other image of a siamese pair is a negative.
        positives: How many images after the anchor are positives, for ``set``.
        perturb: As for ``faithfulness``.
        curve_steps: As for ``faithfulness``.
        baseline: As for ``faithfulness``.
        tolerance: Of the pointing game, in pixels of the pictures or images.
        max_batch: Bounds the images in one forward pass; maps do not depend on it.
        seed: Of the random map that all are measured against.
        progress: Called with the number of methods done and of all after each of them.
        estimate: Called once, after the first of several methods, with the seconds that the others
            will take if each takes as long; those that run the network often take longer.

    Returns:
        The maps with their scores. Methods that do not apply are left out, with the reason.

    Raises:
        ImageError: If a picture or a mask cannot be read.
        ComparisonError: If images, masks or options do not fit.
        SimexplainError: If none of the methods applies: the reason of the first.
    """
    wrapped = as_similarity_model(model)
    setups = setups_of(methods)
    if isinstance(images, Comparison):
        question = _of_tensors(images, masks)
    else:
        roles: dict[str, Any] = {
            "arch": arch_of(len(images)) if arch is None else arch,
            "negative": negative, "positives": positives,
        }  # fmt: skip
        files: Any = (tuple(images), None if masks is None else tuple(masks))
        question = load_item(wrapped, Item(files[0], masks=files[1], **roles))
    in_pass: dict[str, Any] = {"max_batch": max_batch, "check": False}

    def explained(setup: MethodSetup) -> Explanation:
        method, layer, options = setup
        if question.pictures and options.get("upscale", 1) != 1:
            # Then the pictures' own finer detail is shown.
            return explain(wrapped, files[0], method, layer, **roles, **in_pass, **options)
        explanation = explain_tensors(
            wrapped, question.comparison, method, layer, **in_pass, **options
        )
        if not question.pictures:
            return explanation
        return replace(explanation, pictures=question.pictures, geometries=question.geometries)

    notes: tuple[str, ...] = ()
    if question.pictures:
        notes = notes_of(wrapped.preprocess, question.pictures)
    run = _Run(
        wrapped, question, Measures(perturb, curve_steps, baseline, tolerance, max_batch, seed)
    )
    return run.compared(setups, explained, notes, progress, estimate)


def _of_tensors(comparison: Comparison, masks: Any) -> LoadedItem:
    """One comparison of preprocessed images with its masks."""
    check_images(comparison)
    if comparison.batch != 1:
        raise ComparisonError(
            f"Expected one comparison, got {comparison.batch}; compare them one by one, or many at "
            "once with evaluate_faithfulness."
        )
    return LoadedItem(comparison, _masks(masks, comparison))


@dataclass(frozen=True)
class _Run:
    """What is the same for all methods."""

    model: SimilarityModel
    question: LoadedItem
    measures: Measures

    def __post_init__(self) -> None:
        """Refuses before the first method runs what would be refused after it."""
        perturb, steps, baseline = self.measures.curves.values()
        if perturb not in PERTURBATIONS or baseline not in BASELINES or steps < 1:
            raise ComparisonError(
                f"Expected perturb of {', '.join(PERTURBATIONS)}, baseline of "
                f"{', '.join(BASELINES)} and at least one step, got "
                f"'{perturb}', '{baseline}' and {steps}."
            )

    def compared(
        self,
        setups: Mapping[str, MethodSetup],
        explained: Callable[[MethodSetup], Explanation],
        notes: tuple[str, ...],
        progress: Progress | None,
        estimate: Callable[[float], None] | None,
    ) -> MethodComparison:
        """All methods, one after the other; those that do not apply are noted."""
        setups = {name: settled(setup) for name, setup in setups.items()}
        reasons = {name: ready(setup) for name, setup in setups.items()}
        self._warm_up()
        start = time.perf_counter()
        methods: list[ComparedMethod] = []
        skipped: dict[str, SimexplainError] = {}
        for done, (name, setup) in enumerate(setups.items()):
            try:
                if reasons[name]:
                    raise ComparisonError(reasons[name])
                methods.append(self._one(name, setup, explained, methods))
            except torch.OutOfMemoryError:
                raise
            except SimexplainError as error:
                skipped[name] = error
            except RuntimeError as error:  # torch, of a network that a method does not suit
                skipped[name] = SimexplainError(f"{type(error).__name__}: {first_line(error)}.")
            if progress is not None:
                progress(done + 1, len(setups))
            if estimate is not None and (left := len(setups) - done - 1) and len(methods) == 1:
                estimate((methods[0].seconds + methods[0].measuring) * left)
                estimate = None
        if not methods:
            raise next(iter(skipped.values()))
        return MethodComparison(
            methods=tuple(methods),
            random=means(
                self._scores(controlled(methods[0].explanation, "random", self.measures.seed))
            ),
            chance=self.question.chances(self.measures.tolerance),
            skipped={name: str(error) for name, error in skipped.items()},
            masks=self.question.masks,
            notes=notes,
            settings={
                **self.measures.curves, "tolerance": self.measures.tolerance,
                "seed": self.measures.seed,
            },
            seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _warm_up(self) -> None:
        """Runs the survey of layers and a first pass, which are not part of any method's cost."""
        embeddings_of(self.model, self.question.comparison, self.measures.max_batch)
        try:
            self.model.layers_for(self.question.comparison.stacked()[:, 0])
        except SimexplainError:  # a black box has none
            return

    def _one(
        self,
        name: str,
        setup: MethodSetup,
        explained: Callable[[MethodSetup], Explanation],
        before: Sequence[ComparedMethod],
    ) -> ComparedMethod:
        explanation, seconds, forwards = timed(self.model, lambda: explained(setup))
        reference = before[0].explanation if before else explanation
        start = time.perf_counter()
        scores = self._scores(explanation)
        measuring = time.perf_counter() - start
        return ComparedMethod(
            name=name,
            asked=dict(setup[2]),
            explanation=explanation,
            scores=scores,
            agreement=_agreement(reference, explanation),
            forwards=forwards,
            seconds=seconds,
            measuring=measuring,
        )

    def _scores(self, explanation: Explanation) -> dict[str, tuple[float, ...]]:
        return self.measures(self.model, self.question, explanation)


def _agreement(one: Explanation, other: Explanation) -> dict[str, float]:
    """How alike the drawn heatmaps of two explanations are, as the mean over images."""
    pairs = list(zip(_drawn(one), _drawn(other), strict=True))
    return {
        name: mean_valid(torch.tensor([AGREEMENTS[name](*pair) for pair in pairs]))
        for name in _AGREEMENTS
    }


def _drawn(explanation: Explanation) -> Tensor:
    height, width = explanation.images.shape[-2:]
    shrink = min(1.0, _MOST_RANKED / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    return grown(explanation.heatmaps_at(0), size)


def _masks(masks: Sequence[Tensor | None] | None, comparison: Comparison) -> dict[int, Tensor]:
    size = comparison.image_size
    given = [None] * comparison.count if masks is None else list(masks)
    known = [mask for mask in given if mask is not None]
    if len(given) != comparison.count or any(
        tuple(mask.shape) != size or mask.dtype != torch.bool for mask in known
    ):
        shapes = ["None" if mask is None else str(tuple(mask.shape)) for mask in given]
        raise ComparisonError(
            f"Expected a boolean mask of shape {size} or None for each of {comparison.count} "
            f"images, got {', '.join(shapes)}."
        )
    return {index: mask.cpu() for index, mask in enumerate(given) if mask is not None}

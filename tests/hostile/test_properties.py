"""What holds for every size, shape, arrangement and option, drawn at random by hypothesis.

``-m slow`` draws many more of each.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from hostile_commands import Place, prepared, tried
from numbers_of_methods import Convolutions
from PIL import Image
from simexplain_cli.main import cli
from torch import Tensor
from torch.nn import functional as F

from simexplain import Comparison, Explanation, Preprocess, as_similarity_model, explain
from simexplain.data.preprocessing import FITS, INTERPOLATIONS, RESIZINGS
from simexplain.errors import ImageError, SimexplainError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

MANY = int(os.environ.get("SIMEXPLAIN_EXAMPLES", "1500"))


def drawn(few: int) -> Callable[[Any], Any]:
    """A test with some random cases, and, among the slow tests, with many."""

    def made(test: Any) -> Any:
        counts = pytest.mark.parametrize(
            "examples", [few, pytest.param(MANY, marks=pytest.mark.slow)]
        )
        return counts(test)

    return made


def each(examples: int, case: Any, check: Callable[[Any], None]) -> None:
    """Runs a check on so many cases."""
    quiet = list(HealthCheck)
    run = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=quiet,
        derandomize=True,
    )  # fmt: skip
    run(given(case)(check))()


SIDES = st.one_of(st.integers(1, 300), st.integers(1, 20_000), st.sampled_from([1, 2, 223, 225]))
PREPARES = st.builds(
    Preprocess,
    size=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    fit=st.sampled_from(FITS),
    crop_fraction=st.floats(0.2, 2),
    interpolation=st.sampled_from(INTERPOLATIONS),
    resizing=st.sampled_from(RESIZINGS),
)


@drawn(60)
def test_where_a_view_lies(examples: int) -> None:
    """Points, boxes, masks and heatmaps go to the view and back, whatever the sizes."""

    def check(case: tuple[Preprocess, int, int]) -> None:
        prepare, height, width = case
        try:
            geometry = prepare.geometry((height, width))
        except ImageError:
            assert max(height, width) > 50 * min(height, width)
            return
        left, top, right, bottom = geometry.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0 < geometry.seen <= 1
        if prepare.fit == "pad":
            assert geometry.seen > 1 - 1e-9
        for x, y in ((left, top), (right, bottom), ((left + right) / 2, (top + bottom) / 2)):
            there = geometry.point_to_original(*geometry.point_from_original(x, y))
            assert np.allclose(there, (x, y), atol=1e-6 * max(height, width))
        if height * width <= 10**6:
            _check_pixels(prepare, height, width)

    each(examples, st.tuples(PREPARES, SIDES, SIDES), check)


def _check_pixels(prepare: Preprocess, height: int, width: int) -> None:
    """Of a white picture: what the view shows, and where a heatmap over it lies."""
    if prepare.interpolation in ("box", "hamming", "lanczos") and prepare.resizing != "pillow":
        return
    view, geometry = prepare(Image.new("RGB", (width, height), "white"))
    assert view.shape == (3, *prepare.size)
    assert torch.isfinite(view).all()
    heat = geometry.to_original(np.ones(prepare.size, dtype=np.float32))
    assert heat.shape == (height, width)
    left, top, right, bottom = geometry.box
    rows = slice(int(np.ceil(top)), int(np.floor(bottom)))
    columns = slice(int(np.ceil(left)), int(np.floor(right)))
    assert np.allclose(heat[rows, columns], 1)
    hidden = np.ones_like(heat, dtype=bool)
    hidden[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))] = 0
    assert not heat[hidden].any()
    if prepare.fit != "pad" and prepare.crop_fraction <= 1:
        assert geometry.from_original(np.ones((height, width), dtype=bool)).all()


METHODS = {
    "sam": {"weights": ["published", "signed", "relative"], "upscale": [1]},
    "focus": {}, "similarity_cam": {}, "saliency": {}, "input_x_gradient": {},
    "decomposition": {}, "occlusion": {"window": [0.05, 0.4], "stride": [0.1]},
    "random_masks": {"masks": [8, 40]},
}  # fmt: skip


@st.composite
def questions(draw: Any) -> tuple[Comparison, str, dict[str, Any], int | None]:
    """Images of any size in any arrangement, a method with some options, a bound on a pass."""
    batch, positives, negatives = (draw(st.integers(low, 3)) for low in (1, 0, 0))
    positives += positives + negatives == 0
    sides = [draw(st.integers(1, 40)) for _ in range(2)]
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    stacks = [
        torch.rand(batch, *count, 3, *sides, generator=seed)
        for count in ((), (positives,), (negatives,))
    ]
    method = draw(st.sampled_from(sorted(METHODS)))
    options = {
        name: draw(st.sampled_from(values))
        for name, values in METHODS[method].items()
        if draw(st.booleans())
    }
    return Comparison(*stacks), method, options, draw(st.sampled_from([None, 1, 2, 5]))


@drawn(25)
def test_explanations(examples: int) -> None:
    """Every map is finite and as large as its layer, every row as alone, the network as before."""
    torch.manual_seed(0)
    network = Convolutions().eval()
    model = as_similarity_model(network)

    def check(case: tuple[Comparison, str, dict[str, Any], int | None]) -> None:
        images, method, options, most = case
        state = torch.get_rng_state()
        try:
            result = explain(model, images, method, max_batch=most, check=False, **options)
        except SimexplainError:
            assert min(images.anchor.shape[-2:]) < 8
            return
        assert isinstance(result, Explanation)
        _check_maps(result, images)
        _check_alone(model, result, case)
        assert torch.equal(torch.get_rng_state(), state)
        assert not network.training
        assert all(own.grad is None for own in network.parameters())
        assert not any(part._forward_hooks or part._backward_hooks for part in network.modules())

    each(examples, questions(), check)


def _check_maps(result: Explanation, images: Comparison) -> None:
    """Of which shapes and values they are, and of which images the distances."""
    assert result.maps.shape[:2] == (images.batch, images.count)
    assert torch.isfinite(result.maps).all()
    heat = result.heatmaps
    assert heat.shape == (images.batch, images.count, *images.anchor.shape[-2:])
    assert float(heat.min()) >= -1
    assert float(heat.max()) <= 1


def _check_alone(model: Any, result: Explanation, case: tuple[Any, ...]) -> None:
    """The first row alone gives the same, and the distances are those of the embeddings."""
    images, method, options, _ = case
    first = Comparison(images.anchor[:1], images.positives[:1], images.negatives[:1])
    alone = explain(model, first, method, check=False, **options)
    assert isinstance(alone, Explanation)
    assert torch.equal(alone.distances[0], result.distances[0])
    largest = max(float(result.maps[0].abs().max()), 1e-12)
    assert float((alone.maps[0] - result.maps[0]).abs().max()) <= 1e-6 * largest
    rows = embedded(model, torch.cat([first.anchor[:, None], *_others(first)], dim=1)[0])
    plain = (rows[1:] - rows[:1]).norm(dim=1)
    assert torch.allclose(result.distances[0], plain, atol=1e-5)


def _others(first: Comparison) -> list[Tensor]:
    return [stack for stack in (first.positives, first.negatives) if stack.shape[1]]


def embedded(model: Any, images: Tensor) -> Tensor:
    """Unit embeddings, by the network alone."""
    with torch.no_grad():
        return F.normalize(torch.cat([model.network(image[None]) for image in images]), dim=1)


NUMBERS = ("-1", "0", "1", "2", "7", "0.5", "-0.0", "1e9", "nan", "inf", "2147483648", "two", "")
TEXTS = ("", "sam", "focus", "x", "sam:weights=", "a,b", "1,2", "0.5,0.5,0.5", "../x", "é\n", "--")
BASES: dict[str, Callable[[Place], tuple[str, ...]]] = {
    "explain": lambda p: ("explain", p.network, p.good, p.other),
    "match": lambda p: ("match", p.network, p.good, p.other),
    "segment": lambda p: ("segment", p.network, p.good, p.other),
    "compare": lambda p: ("compare", p.network, p.good, p.other, "--method", "sam"),
    "attribute": lambda p: ("attribute", str(p.root / "avsl.pt"), p.good, p.other),
    "search": lambda p: ("search", p.network, p.good, str(p.root / "good.index")),
    "batch": lambda p: ("batch", p.network, p.table(Path(p.good))),
    "index": lambda p: ("index", p.network, p.data(0)),
    "bank": lambda p: ("bank", p.network, p.data(0)),
    "fit": lambda p: ("fit", p.network, p.data(0)),
    "layers": lambda p: ("layers", p.network),
}
SUFFIXES = {"bank": ".safetensors", "fit": ".pt", "index": ".index"}
LEFT_OUT = ("out", "help", "help_all", "open_figure", "workers", "device", "devices")


def values_of(option: click.Option, place: Place) -> st.SearchStrategy[str]:
    """Right and wrong values of an option."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return st.sampled_from([*map(str, kind.choices), "none of these"])
    if isinstance(kind, (click.types.IntParamType, click.types.FloatParamType)):
        return st.sampled_from(NUMBERS)
    files = (place.good, place.network, str(place.root), str(place.root / "missing"))
    return st.sampled_from((*TEXTS, *NUMBERS, *files))


@st.composite
def lines(draw: Any, place: Place) -> tuple[str, ...]:
    """A command with up to three of its options, each with a value."""
    name = draw(st.sampled_from(sorted(BASES)))
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [
        option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in LEFT_OUT
    ]
    words: list[str] = []
    for option in draw(st.lists(st.sampled_from(options), max_size=3, unique=True)):
        words += [draw(st.sampled_from([*option.opts, *option.secondary_opts]))]
        words += [] if option.is_flag else [draw(values_of(option, place))]
    return (*BASES[name](place), *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("properties"))


@pytest.fixture
def outs(place: Place) -> Iterator[Path]:
    """Places for results, each a new one."""
    folder = place.root / "outs"
    folder.mkdir(exist_ok=True)
    return (folder / f"{number}" for number in itertools.count())


@drawn(12)
def test_options(place: Place, outs: Iterator[Path], examples: int) -> None:
    """Any command with any options: a result or one sentence, in 20 seconds."""

    def check(words: tuple[str, ...]) -> None:
        out = next(outs)
        own = (*words, "--out", out) if words[0] != "layers" else words
        found = tried(words[0], own, " ".join(map(ascii, words)), place.root, out)
        assert not found.faults, (found.name, found.faults)

    each(examples, lines(place), check)

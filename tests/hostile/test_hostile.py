"""Files that are no pictures and no models, through every command: one sentence, and nothing else.

The quick part takes a sample of every kind; ``-m slow`` takes everything with every command.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_commands import MODEL, PICTURE, Outcome, Place, campaign, prepared
from hostile_models import write_models
from hostile_pictures import GOOD, write_pictures

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def pictures(place: Place) -> list[Path]:
    return write_pictures(place.root / "pictures")


@pytest.fixture(scope="module")
def models(place: Place) -> list[Path]:
    return write_models(place.root / "models", place.root / "sprung")


def bad(outcomes: list[Outcome]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(one.command, one.name, one.faults) for one in outcomes if one.faults]


def test_there_are_enough(pictures: list[Path], models: list[Path]) -> None:
    assert len(pictures) >= 300
    assert len(models) >= 60


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), 199])
def test_pictures(place: Place, pictures: list[Path], share: int) -> None:
    outcomes = list(campaign(place, pictures, PICTURE, share))
    assert bad(outcomes) == []
    drawing = ("explain", "match", "segment", "compare", "attribute", "search", "index")
    for one in outcomes:
        own = one.name.removeprefix("pictures/")
        if own.startswith(GOOD) and one.command in drawing and one.run is not None:
            assert one.run.code == 0 or "elongated" in one.run.err, (one.name, one.run.err)


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), 61])
def test_models(place: Place, models: list[Path], share: int) -> None:
    outcomes = list(campaign(place, models, MODEL, share))
    assert bad(outcomes) == []
    forged = [one for one in outcomes if "/forged-" in one.name or "pickle" in one.name]
    assert all(one.run is not None and one.run.code for one in forged if one.command != "train")

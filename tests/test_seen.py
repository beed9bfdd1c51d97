"""What share of each picture the network saw stands in every result, as JSON and as a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import FAST, NETWORK, Run
from pictures import noise

FRACTION = 64 / 67
"""Of a picture in the shape of its input, what timm's ResNet-18 sees along each side."""
WIDE, SQUARE = FRACTION**2 / 2, FRACTION**2
LINE = f"The network saw {WIDE:.0%} of"


@pytest.fixture
def both(run: Callable[..., Run], here: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """The text of a command and its JSON, in a folder with a wide and a square picture."""
    (here / "photos").mkdir()
    noise(160, 80, seed=1).save(here / "wide.png")
    noise(90, 90, seed=2).save(here / "square.png")
    noise(160, 80, seed=3).save(here / "photos" / "a.png")
    noise(90, 90, seed=4).save(here / "photos" / "b.png")

    def start(*arguments: object) -> tuple[str, dict[str, Any]]:
        done = run(*arguments, "--out", "first", *FAST)
        assert done.code == 0, done.err
        record = run(*arguments, "--out", "second", *FAST, "--json")
        assert record.code == 0, record.err
        return done.out, json.loads(record.out)

    return start


def test_match(both: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, record = both("match", NETWORK, "wide.png", "square.png")
    shares = [image["geometry"]["seen"] for image in record["images"]]
    assert shares == pytest.approx([WIDE, SQUARE], abs=0.02)
    assert f"{LINE} 'wide.png'" in text
    assert "square.png'" not in text.split(LINE)[1].split(";")[0]


def test_index(both: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, record = both("index", NETWORK, "photos")
    assert record["seen"]["least"] == pytest.approx(WIDE, abs=0.02)
    assert record["seen"]["least_of"] == "a.png"
    assert record["seen"]["mean"] == pytest.approx((WIDE + SQUARE) / 2, abs=0.02)
    assert f"{LINE} 'a.png'" in text


def test_search(both: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    pytest.importorskip("faiss")
    text, record = both("search", NETWORK, "wide.png", "photos")
    assert record["seen"] == pytest.approx(WIDE, abs=0.02)
    shares = {Path(hit["path"]).name: hit["seen"] for hit in record["hits"]}
    assert shares == pytest.approx({"a.png": WIDE, "b.png": SQUARE}, abs=0.02)
    assert f"{LINE} 'wide.png'" in text


def test_segment(both: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, record = both("segment", NETWORK, "wide.png", "square.png", "--view", "model")
    assert record["seen"] == pytest.approx(WIDE, abs=0.02)
    assert [one["seen"] for one in record["geometries"]] == pytest.approx([WIDE, SQUARE], abs=0.02)
    assert f"{LINE} 'wide.png'" in text


def test_segment_sees_all_unless_told(both: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    text, record = both("segment", NETWORK, "square.png", "wide.png")
    assert record["seen"] == 1
    assert "The network saw" not in text


def test_explain(
    both: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    text, record = both("explain", NETWORK, "wide.png", "square.png", "--arch", "siamese")
    shares = [image["geometry"]["seen"] for image in record["images"]]
    assert shares == pytest.approx([WIDE, SQUARE], abs=0.02)
    assert f"{LINE} 'wide.png'" in text
    assert "square.png'" not in text.split(LINE)[1].split(";")[0]

"""One contract for every type of result: saved, loaded, damaged, written as JSON, shown."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import simexplain
from simexplain.data.folders import Record
from simexplain.data.images import Picture
from simexplain.data.preprocessing import Preprocess
from simexplain.errors import OutputError
from simexplain.evaluation.results import Evaluation, FaithfulnessScores, SanityScores
from simexplain.evaluation.retrieval_result import Failure
from simexplain.metrics.ranking import Ranking
from simexplain.publishing import KINDS, Kind
from simexplain.results.codec import Views, decoded, encoded, plain
from simexplain.results.result import Result, Table
from simexplain.segmentation.evaluating import EpisodeScore, FoldScore, Overlap

SAVED = Path(__file__).parent / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
TYPES = {
    made.__name__: made
    for made in (
        simexplain.Attribution, Evaluation, simexplain.Explanation, FaithfulnessScores,
        simexplain.Matching, simexplain.MethodComparison, simexplain.PairExplanation,
        simexplain.Reidentification, simexplain.Retrieval, SanityScores, simexplain.SearchResult,
        simexplain.Segmentation, simexplain.SegmentationScores, simexplain.TrainResult,
    )
}  # fmt: skip
TOO_LITTLE = ("reid", "retrieval", "segmentation_scores")
"""What version 0.1.0 saved without what loading needs."""
LOADED = sorted(EXPECTED.keys() - set(TOO_LITTLE))
MADE = [name for name in (*LOADED, *TOO_LITTLE) if name != "training"]
EVIL = "<script>&"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """All values of a result by where they are; of arrays the type, the shape and a digest."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value)
        if raw.dtype.kind == "f":
            raw = np.where(np.isnan(raw), np.array(np.nan, raw.dtype), raw)
        sum_of = hashlib.sha256(raw.tobytes()).hexdigest()[:16]
        return {path: [str(raw.dtype), list(raw.shape), sum_of]}
    if is_dataclass(value):
        named = {f".{field.name}": getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Mapping):
        named = {f"[{name}]": own for name, own in value.items()}
    elif isinstance(value, (list, tuple)):
        named = {f"[{number}]": own for number, own in enumerate(value)}
    else:
        known = None if isinstance(value, float) and math.isnan(value) else value
        return {path: str(known) if isinstance(known, Path) else known}
    empty: Any = {} if isinstance(value, Mapping) else []
    result = {k: v for name, own in named.items() for k, v in flat(own, path + name).items()}
    return result or {path: empty}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(flat(value), sort_keys=True).encode()).hexdigest()[:12]


def of_0_1_0(name: str) -> Any:
    return TYPES[EXPECTED[name]["type"]].load(SAVED / name)


@pytest.mark.parametrize("name", LOADED)
def test_results_of_version_0_1_0_load_with_equal_values(name: str) -> None:
    loaded = of_0_1_0(name)
    result = {field.name: digest(getattr(loaded, field.name)) for field in fields(loaded)}
    moved = {"folder", "files"} if name == "training" else set()
    assert {key for key, own in result.items() if own != EXPECTED[name]["fields"][key]} <= moved


@pytest.mark.parametrize("name", TOO_LITTLE)
def test_results_that_kept_too_little_are_refused(name: str) -> None:
    with pytest.raises(OutputError, match=r"by version 0\.1\.0, which did not keep .* again"):
        of_0_1_0(name)


def test_a_training_run_is_found_where_it_is_now() -> None:
    run = of_0_1_0("training")
    assert run.folder == SAVED / "training"
    assert run.files["model"] == str(SAVED / "training" / "model.pt")
    with pytest.raises(OutputError, match="already; copy that folder"):
        run.save("elsewhere")


def measured(name: str) -> Any:
    """Results made by hand, with a query that has nothing to find."""
    if name == "segmentation_scores":
        counts = (Overlap(1, 2, 3, 4), Overlap())
        episode = EpisodeScore("t.png", ("a", EVIL), (("s.png",), ("u.png",)), counts, Overlap(4))
        return simexplain.SegmentationScores((FoldScore("f", (episode,)),), {"k": 1}, {"x": "no"})
    whole = torch.tensor([[2, 2], [1, 0], [1, 0], [1, -1]])
    shares = torch.tensor([[0.5, math.nan]] * 4, dtype=torch.float64)
    ranking = Ranking(*whole, *shares)
    people = [Record(Path(f"{n}.png"), f"{EVIL}{n % 2}", camera=str(n)) for n in range(4)]
    shared = {"errors": {"y.png": "no"}, "settings": {"model": "net"}}
    if name == "retrieval":
        return simexplain.Retrieval(ranking, people[:2], people[2:], (1, 2), **shared)
    failure = Failure(people[0], people[3], people[2], 2, 0.5, (0.1, 0.2))
    made = simexplain.Reidentification(
        ranking, tuple(people[:2]), tuple(people[2:]), (1,), 0, (failure,), **shared
    )
    return replace(made, failures=())  # their figure would read the pictures


@cache
def result(name: str) -> Any:
    return measured(name) if name in TOO_LITTLE else of_0_1_0(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A saved result, written once, in a folder of the test's own."""
    written: dict[str, Path] = {}

    def made(name: str, target: Path) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name) / "out"
            result(name).save(written[name])
        return Path(shutil.copytree(written[name], target / "out"))

    return made


@pytest.mark.parametrize("name", MADE)
def test_what_is_saved_is_loaded(name: str, saved: Any, tmp_path: Path) -> None:
    before = result(name)
    folder = saved(name, tmp_path)
    assert flat(type(before).load(folder)) == flat(before)
    kind = KINDS[type(before).__name__]
    record = json.loads((folder / kind.manifest).read_text(encoding="utf-8"))
    names = {Path(path).name for path in record["files"].values()}
    assert names == {path.name for path in folder.iterdir()}
    others = names - {kind.manifest}
    assert {key: hashlib.sha256((folder / key).read_bytes()).hexdigest() for key in others} == (
        record.get("digests", {})
    )


@pytest.mark.parametrize("name", [n for n in MADE if n in (*TOO_LITTLE, "sanity", "evaluation")])
def test_numbers_fit_into_one_file(name: str, tmp_path: Path) -> None:
    file = result(name).save(tmp_path / "new" / "alone.json")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["alone.json"]
    assert flat(type(result(name)).load(file)) == flat(result(name))


@pytest.mark.parametrize("name", MADE)
def test_a_changed_byte_is_noticed(name: str, saved: Any, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    arrays = KINDS[type(result(name)).__name__].arrays
    if not arrays:
        pytest.skip("its JSON has all")
    path = folder / arrays
    content = bytearray(path.read_bytes())
    content[-30] ^= 1  # in the list of the archive's members, or a comment of it
    path.write_bytes(bytes(content))
    with pytest.raises(OutputError, match=r"was changed|damaged"):
        type(result(name)).load(folder)


@pytest.mark.parametrize("name", MADE)
def test_killed_while_writing_leaves_the_old_one(
    name: str, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(name, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    made = type(result(name))
    monkeypatch.setattr(made, "attachments", lambda *_, **__: {"table": ("t.csv", killed)})
    with pytest.raises(KeyboardInterrupt):
        result(name).save(folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [*MADE, "training"])
def test_json_is_strict_and_plain(name: str) -> None:
    record = result(name).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == 1
    assert {"files", "kind"} & record.keys()


def named_so(name: str) -> Any:
    """A result with a name that is also HTML."""
    actual = result(name)
    if name == "comparison":
        return replace(actual, methods=(replace(actual.methods[0], name=EVIL),))
    if name.startswith("pair"):
        return replace(actual, first=replace(actual.first, method=EVIL))
    field = {
        "segmentation": "name", "search": "query", "search_region": "query", "training": "best"
    }.get(name, "method")  # fmt: skip
    known = {field.name for field in fields(actual)}
    return replace(actual, **({field: EVIL} if field in known else {}))


SHOWN = ("comparison", "explanation", "pair", "segmentation", "training", *TOO_LITTLE)


@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_get_escaped_names(name: str) -> None:
    text = named_so(name)._repr_html_()
    assert text.startswith(("<img", "<pre>"))
    assert "&lt;script&gt;&amp;" in text or name == "reid"
    assert not re.search("<(?!/?(img|pre|p)\\b)", text)


@dataclass(frozen=True)
class Inner:
    values: Tensor
    path: Path | None = None


@dataclass(frozen=True)
class Everything(Result):
    """A type of every kind of field."""

    preprocess: Preprocess
    images: Views
    sides: tuple[Views, Views]
    named: Annotated[Mapping[str, Tensor], "own"]
    inner: Inner
    inners: tuple[Inner, ...]
    array: np.ndarray[Any, np.dtype[np.float32]] | None
    numbers: Mapping[int, float]
    ragged: tuple[tuple[str, float | None], ...]
    options: Mapping[str, Any]
    picture: Picture | None = None

    def summary(self, **options: Any) -> dict[str, Any]:
        return {"numbers": self.numbers, "rows": len(self.inners)}

    def attachments(self, **options: Any) -> dict[str, Any]:
        rows = [{"a": 1.5, "b": math.nan}, {"a": "ä\udcff", "b": 2}]
        pixels = np.zeros((2, 2), np.uint8)
        return {"table": ("t.csv", lambda: Table(rows)), "p": ("p.png", lambda: pixels)}


def everything() -> Everything:
    prepare = Preprocess((2, 2))
    images = prepare.redo(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    inner = Inner(torch.arange(3), Path("a/b"))
    return Everything(
        prepare, images, (images, images + 0), {"x.y/z": torch.ones(2, 2).bool()}, inner,
        (inner, Inner(torch.tensor([math.nan]))), np.float32([1.5, math.inf]), {3: math.nan, 1: 2},
        (("a", None), ("b", 0.5)), {"upscale": 2, "list": [1]},
    )  # fmt: skip


def test_a_new_type_needs_a_line_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind("test", {"manifest": "e.json", "arrays": "e.npz", "table": "t.csv"})
    monkeypatch.setitem(KINDS, "Everything", kind)
    files = everything().save(tmp_path / "out")
    assert list(files) == ["manifest", "arrays", "table", "p"]
    assert flat(Everything.load(tmp_path / "out")) == flat(everything())
    text = (tmp_path / "out" / "t.csv").read_bytes()
    assert text.split(b"\r\n")[:3] == [b"a,b", b"1.5,", "ä\\udcff,2".encode()]
    with np.load(files["arrays"]) as stored:
        assert {"views", "views_0", "own_0", "inner.values"} <= {*stored.files}
    assert "<pre>" in everything()._repr_html_()


def test_damaged_fields_are_told(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    record = encoded(everything(), arrays)
    assert flat(decoded(Everything, json.loads(json.dumps(record)), arrays)) == flat(everything())
    for name, value in (
        ("images", "none"), ("inner", 5), ("inners", {}), ("numbers", {"x": 1}), ("named", []),
        ("ragged", [["a"]]), ("ragged", [[1, 2.0]]), ("preprocess", {"odd": 1, "size": 3}),
    ):  # fmt: skip
        with pytest.raises((ValueError, KeyError, TypeError, simexplain.SimexplainError)):
            decoded(Everything, {**record, name: value}, arrays)


def test_plain_values() -> None:
    value = {1: torch.tensor([1, 2]), "a": (math.nan, np.float64(2), Path("b"), None, True)}
    assert plain(value) == {"1": [1, 2], "a": [None, 2.0, "b", None, True]}

"""Re-identification: readers on official trees, the protocol against plain loops, end to end."""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Run
from conftest import TinyNet
from person_cases import market, put_person
from torch import Tensor

from simexplain import as_similarity_model, evaluate_reid
from simexplain.data.dataset_split import DataSplit
from simexplain.data.datasets import read_dataset
from simexplain.data.folders import Record
from simexplain.errors import ComparisonError, ImageError, OutputError
from simexplain.evaluation.retrieval import Embedded, masks_of, ranked_reid
from simexplain.evaluation.retrieval_result import FAILURE_COLUMNS, Reidentification
from simexplain.publishing import KINDS

SMALL = ("--untrained", "--size", "64x32", "--fit", "squash")
NETWORK = "timm:test_resnet"


def records(names: list[tuple[str, str]]) -> tuple[Record, ...]:
    """Persons and cameras, each with a path of its own."""
    return tuple(
        Record(Path(f"{index}_{person}_c{camera}.jpg"), person, camera=camera)
        for index, (person, camera) in enumerate(names)
    )


def on_a_line(queries: list[tuple[str, str]], gallery: list[tuple[str, str, float]], **options):
    """Queries at 0 and a gallery at given distances."""
    rows = torch.tensor([[index] for *_, index in gallery], dtype=torch.float64)
    requested = Embedded(torch.zeros(len(queries), 1).double(), records(queries), {})
    wanted = Embedded(rows, records([entry[:2] for entry in gallery]), {})
    return ranked_reid(as_similarity_model(TinyNet()), requested, wanted, **options)


def official(
    distances: Tensor, queries: tuple[Record, ...], gallery: tuple[Record, ...]
) -> list[tuple[int, float, float] | None]:
    """Place of the first right one, mean precision and Market-1501's own average precision.

    Restated from the protocol: walk along the ranking, skip junk, count. One query at a time.
    """
    result: list[tuple[int, float, float] | None] = []
    for q, query in enumerate(queries):
        order = sorted(range(len(gallery)), key=lambda g: float(distances[q, g]))
        good = {
            g
            for g, other in enumerate(gallery)
            if other.label == query.label and other.camera != query.camera
        }
        junk = {
            g
            for g, other in enumerate(gallery)
            if other.label == "-1" or (other.label == query.label and other.camera == query.camera)
        }
        first, hits, index = 0, 0, 0
        recall_before, precision_before, trapezoids, precisions = 0.0, 1.0, 0.0, []
        for g in order:
            if g in junk:
                continue
            index += 1
            if g in good:
                hits += 1
                first = first or index
                precisions.append(hits / index)
            recall, precision = hits / max(1, len(good)), hits / index
            trapezoids += (recall - recall_before) * (precision_before + precision) / 2
            recall_before, precision_before = recall, precision
        result.append((first, sum(precisions) / len(good), trapezoids) if good else None)
    return result


def crowd(seed: int) -> tuple[Embedded, Embedded]:
    """Random rows of persons who return, with junk, distractors and somebody seen only once."""
    draw = torch.Generator().manual_seed(seed)

    def some(count: int, people: list[str]) -> Embedded:
        who = torch.randint(0, len(people), (count,), generator=draw).tolist()
        where = torch.randint(1, 4, (count,), generator=draw).tolist()
        rows = torch.randn(count, 4, generator=draw, dtype=torch.float64)
        names = [(people[w], str(c)) for w, c in zip(who, where, strict=True)]
        return Embedded(rows, records(names), {})

    people = [f"{n:04d}" for n in range(1, 7)]
    return some(25, [*people, "0099"]), some(60, [*people, "0000", "0000", "-1", "-1"])


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_are_those_of_the_official_protocol_walked_one_by_one(seed: int) -> None:
    queries, gallery = crowd(seed)
    result = ranked_reid(as_similarity_model(TinyNet()), queries, gallery, ranks=(1, 2, 5, 10))
    expected = official(torch.cdist(queries.rows, gallery.rows), queries.records, gallery.records)
    for index, one in enumerate(expected):
        ranking = result.ranking
        if one is None:
            assert int(ranking.first[index]) == 0
            assert math.isnan(float(ranking.average_precision[index]))
            continue
        assert int(ranking.first[index]) == one[0]
        assert float(ranking.average_precision[index]) == pytest.approx(one[1], abs=1e-12)
        assert float(ranking.trapezoid_precision[index]) == pytest.approx(one[2], abs=1e-12)
    lines = [one for one in expected if one is not None]
    assert result.skipped == len(expected) - len(lines) > 0
    assert result.map == pytest.approx(sum(one[1] for one in lines) / len(lines))
    assert result.map_trapezoid == pytest.approx(sum(one[2] for one in lines) / len(lines))
    for k in (1, 2, 5, 10):
        share = sum(one[0] <= k for one in lines) / len(lines)
        assert result.rank[k] == pytest.approx(share)
        assert float(result.cmc()[k - 1]) == pytest.approx(share)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_other_libraries(seed: int) -> None:
    """PCB's code asks scikit-learn, which PCB's published mAP therefore comes from."""
    metrics = pytest.importorskip("sklearn.metrics")
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    queries, gallery = crowd(seed)
    result = ranked_reid(as_similarity_model(TinyNet()), queries, gallery)
    relevant, ignored = masks_of(queries.records, gallery.records)
    everything = slice(0, len(queries.rows))
    truth, kept = relevant(everything), ~ignored(everything)
    scores = 10 - torch.cdist(queries.rows, gallery.rows)  # torchmetrics wants positive ones
    for index in range(len(queries.rows)):
        known, own = truth[index, kept[index]], scores[index, kept[index]]
        if known.any():
            actual = float(result.ranking.average_precision[index])
            assert actual == pytest.approx(metrics.average_precision_score(known, own))
            other = retrieval.retrieval_average_precision(own.float(), known)
            assert actual == pytest.approx(float(other), abs=1e-6)


def test_a_case_by_hand_with_junk_the_own_camera_and_a_distractor() -> None:
    result = on_a_line(
        [("0001", "1"), ("0002", "2")],
        [
            ("-1", "2", 0.1),  # ignored
            ("0001", "1", 0.2),  # the first query's own camera: ignored for it alone
            ("0000", "2", 0.3),  # a distractor: wrong for everybody
            ("0001", "2", 0.4),
            ("0002", "1", 0.5),
            ("0001", "3", 0.6),
        ],
        ranks=(1, 2, 3, 4),
        junk=3,
    )
    # First query: 0000, 0001, 0002, 0001. Second: 0001, 0000, 0001, 0002, 0001.
    assert result.ranking.first.tolist() == [2, 4]
    assert result.ranking.candidates.tolist() == [4, 5]
    assert result.rank == {1: 0, 2: 0.5, 3: 0.5, 4: 1}
    assert result.ranking.average_precision.tolist() == [(1 / 2 + 2 / 4) / 2, 1 / 4]
    # Precision before each place: 0 and 1/3 for the first query, 0 for the second.
    wanted = [((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2, (0 + 1 / 4) / 2]
    assert result.ranking.trapezoid_precision.tolist() == pytest.approx(wanted)
    assert (result.junk, result.distractors, result.searched) == (4, 1, 5)
    first, second = result.failures
    assert (first.query.label, first.first, first.wrong.label) == ("0002", 4, "0001")
    assert (second.query.label, second.wrong.label, second.right.camera) == ("0001", "0000", "2")
    assert second.distances == pytest.approx((0.3, 0.4))


def test_numbers_in_names_are_numbers(tmp_path: Path) -> None:
    """However many zeros persons and cameras begin with."""
    root = market(tmp_path)
    put_person(root / "query", "77_c1s1_000001_00.jpg")
    put_person(root / "bounding_box_test", "0077_c01s1_000002_00.jpg")
    put_person(root / "bounding_box_test", "077_c2s1_000003_00.jpg")
    split = read_dataset("market1501", root)
    own = [r for r in (*split.queries, *split.gallery) if r.path.name.lstrip("0").startswith("77_")]
    assert {record.label for record in own} == {"0077"}
    assert [record.camera for record in own] == ["1", "1", "2"]
    assert len({record.group for record in own}) == 2


def test_junk_changes_no_number_whether_it_is_embedded_or_left_out() -> None:
    queries, gallery = crowd(7)
    model = as_similarity_model(TinyNet())
    kept = [n for n, record in enumerate(gallery.records) if record.label != "-1"]
    fewer = Embedded(gallery.rows[kept], tuple(gallery.records[n] for n in kept), {})
    junk = len(gallery.records) - len(kept)
    with_it = ranked_reid(model, queries, gallery).to_json()
    without = ranked_reid(model, queries, fewer, junk=junk).to_json()
    assert junk > 4
    assert with_it == without


def test_of_equal_distances_the_right_one_comes_last() -> None:
    gallery = [("0001", "2", 0.5), ("0002", "2", 0.5), ("0001", "3", 0.5)]
    result = on_a_line([("0001", "1")], gallery)
    assert result.ranking.first.tolist() == [2]
    assert result.ranking.average_precision.tolist() == [(1 / 2 + 2 / 3) / 2]
    assert result.failures[0].distances == (0.5, 0.5)
    assert on_a_line([("0001", "1")], gallery[::-1]).to_json()["map"] == result.map


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_blocks_change_nothing(block: int) -> None:
    queries, gallery = crowd(3)
    model = as_similarity_model(TinyNet())
    record = ranked_reid(model, queries, gallery, block=block).to_json()
    assert record == ranked_reid(model, queries, gallery).to_json()


def test_a_distractor_is_right_for_nobody_not_even_for_itself() -> None:
    result = on_a_line(
        [("0000", "1"), ("0001", "1")], [("0000", "2", 0.1), ("0001", "2", 0.2)]
    )  # fmt: skip
    assert result.ranking.relevant.tolist() == [0, 1]
    assert result.skipped == 1


def test_cameras_are_told_apart() -> None:
    gallery = [("0001", "2", 0.1), ("0002", "1", 0.2), ("0001", "1", 0.3)]
    result = on_a_line([("0001", "1"), ("0002", "2"), ("0001", "2")], gallery)
    assert [(row["camera"], row["queries"], row["rank_1"]) for row in result.cameras()] == [
        ("1", 1, 1.0),
        ("2", 2, 0.0),
    ]
    text = str(result).splitlines()
    assert text[0].split() == ["rank-1", "rank-5", "rank-10", "mAP", "queries"]
    assert text[1].split()[:2] == ["all", "0.333"]


# Readers


def test_market_as_it_unpacks(tmp_path: Path) -> None:
    root = market(tmp_path / "Market-1501-v15.09.15")
    put_person(root / "query", "0000_c1s1_000000_00.jpg")  # nobody asks for a distractor
    put_person(root / "bounding_box_train", "-1_c1s1_000000_00.jpg")  # nor learns from junk
    for folder in (tmp_path, root):
        split = read_dataset("market1501", folder)
        assert (len(split.train), len(split.queries)) == (24, 8)
        assert len(split.gallery or ()) == 8 + 3
        assert len(split.junk) == 3
        assert {record.label for record in split.junk} == {"-1"}
        assert {record.camera for record in split.gallery or ()} == {"1", "2"}
        assert split.problems == ()
        first = split.queries[0]
        assert (first.label, first.camera, first.group) == ("0007", "1", "0007_c1")


def test_cuhk03_both_ways(tmp_path: Path) -> None:
    for kind in ("detected", "labeled"):
        for part, name in (
            ("bounding_box_train", "0003_c1_1.png"), ("query", "0001_c1_2.png"),
            ("bounding_box_test", "0001_c2_7.png"), ("bounding_box_test", "0001_c1_3.png"),
        ):  # fmt: skip
            put_person(tmp_path / kind / part, name)
        split = read_dataset("cuhk03", tmp_path / kind)
        assert [(r.label, r.camera) for r in split.gallery or ()] == [("0001", "1"), ("0001", "2")]
        result = evaluate_reid(TinyNet(), split)
        # The own camera's picture does not count, the other one is found.
        assert result.ranking.candidates.tolist() == [1]
        assert result.rank[1] == 1
    with pytest.raises(ImageError, match="holds CUHK03-NP twice"):
        read_dataset("cuhk03", tmp_path)


# End to end


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_pictures_from_python(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "query" / "0007_c1s1_000001_00.jpg").write_text("no picture", encoding="utf-8")
    model = TinyNet().eval()
    done: list[str] = []
    result = evaluate_reid(
        model, read_dataset("market1501", root), ranks=(1, 3),
        progress=lambda what, now, total: done.append(what),
    )  # fmt: skip
    assert isinstance(result, Reidentification)
    assert (len(result.queries), result.searched, result.junk) == (8, 11, 3)
    assert [Path(path).name for path in result.errors] == ["0007_c1s1_000001_00.jpg"]
    assert list(dict.fromkeys(done)) == ["Embedding queries", "Embedding gallery", "Ranking"]
    assert [parameter.grad for parameter in model.parameters() if parameter.grad is not None] == []
    files = result.write(tmp_path / "out", force=False)
    with pytest.raises(OutputError, match="already"):
        result.write(tmp_path / "out", force=False)
    rows = table(files["queries"])
    assert len(rows) == 8
    failed = table(files["failures"])
    assert len(failed) == len(result.failures)
    assert [row["query"] for row in failed] == [str(one.query.path) for one in result.failures]
    assert sum(row["nearest_person"] != row["person"] for row in rows) == len(failed)


def test_no_failures_leave_no_figure(tmp_path: Path) -> None:
    result = on_a_line([("0001", "1")], [("0001", "2", 0.1)])
    files = result.write(tmp_path / "scores", force=False)
    assert set(files) == {"results", "queries", "failures", "arrays"}
    lines = (tmp_path / "scores" / "failures.csv").read_text(encoding="utf-8").splitlines()
    assert lines == [",".join(FAILURE_COLUMNS)]
    assert tuple(result.failures) == ()


def test_the_command_and_its_json(run: Callable[..., Run], here: Path) -> None:
    data = market(here / "data")
    put_person(data / "query", "0042_c1s1_000001_00.jpg")  # never seen again
    (data / "query" / "portrait.jpg").write_bytes((here / "whole.jpg").read_bytes())
    start = ("evaluate", "reid", NETWORK, data, *SMALL)
    result = run(*start, "--json", "--out", "scores", "--ranks", "1,3")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert (record["schema"], record["kind"]) == (1, "reid")
    assert set(record["rank"]) == {"1", "3"}
    assert 0 < record["map"] <= 1
    counts = [record[name] for name in ("queries", "skipped", "persons", "gallery", "distractors")]
    assert counts == [8, 1, 5, 11, 3]
    assert record["junk"] == 3
    assert record["settings"]["ties"] == "relevant last"
    assert record["settings"]["dataset"] == "market1501"
    assert record["warnings"] == ["names without person and camera: 'query/portrait.jpg'"]
    assert len(record["cmc"]) == 50
    stored = json.loads((here / "scores" / "reid.json").read_text(encoding="utf-8"))
    assert {**stored, "warnings": record["warnings"]} == record
    assert {path.name for path in (here / "scores").iterdir()} <= set(
        KINDS["Reidentification"].names
    )
    again = run(*start, "--out", "scores")
    assert again.code == 1
    assert "already" in again.err
    assert run(*start, "--out", "scores", "--force").code == 0


def test_what_the_command_prints(run: Callable[..., Run], here: Path) -> None:
    data = market(here / "data")
    # Pictures of one colour: every person looks alike, so that all ties go wrong.
    blank = (data / "query").glob("*.jpg")
    pixels = next(blank).read_bytes()
    for path in [*(data / "query").glob("*.jpg"), *(data / "bounding_box_test").glob("*.jpg")]:
        path.write_bytes(pixels)
    result = run("evaluate", "reid", NETWORK, data, *SMALL)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == (
        "timm:test_resnet, Market-1501: 8 queries of 4 persons, searched in 11 pictures "
        "(3 of distractors, 3 more of junk ignored)"
    )
    assert lines[2].split()[:2] == ["all", "0.000"]
    assert lines[5] == "8 queries found another person first; the worst, explained:"
    words = lines[6].split()
    assert words[:3] == ["simexplain", "explain", NETWORK]
    explained = run(*words[1:], "--out", "why")
    assert explained.code == 0, explained.err
    assert (here / "why" / "explanation.png").exists()


def test_what_is_refused(fails: Callable[..., str], here: Path) -> None:
    start = ("evaluate", "reid", NETWORK)
    assert "bounding_box_train" in fails(*start, here, *SMALL)
    data = market(here / "data")
    assert "is a file" in fails(*start, data, *SMALL, "--out", "a.png")
    assert "Invalid value" in fails(*start, data, *SMALL, "--kind", "duke", code=2)
    for path in (data / "bounding_box_test").glob("0*.jpg"):
        path.unlink()
    assert "Expected at least one gallery picture" in fails(*start, data, *SMALL)
    put_person(data / "bounding_box_test", "0003_c2s1_000001_00.jpg")
    text = fails(*start, data, *SMALL)
    assert "before another camera" in text


def test_records_need_persons_and_cameras() -> None:
    whole = records([("0001", "1"), ("0001", "2")])
    for broken, what in (
        (Record(Path("x"), None, camera="1"), "person"),
        (Record(Path("x"), "1"), "camera"),
    ):
        with pytest.raises(ComparisonError, match=f"Expected a {what} for every picture"):
            evaluate_reid(TinyNet(), DataSplit((), whole, (broken,)))
    with pytest.raises(ComparisonError, match="ranks of at least 1"):
        evaluate_reid(TinyNet(), DataSplit((), whole, whole), ranks=(0,))
    with pytest.raises(ImageError, match="gallery picture"):
        evaluate_reid(TinyNet(), DataSplit((), whole))


def test_the_drawn_persons_of_the_benchmark_lie_as_market_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    persons = importlib.import_module("persons")
    split = read_dataset("market1501", persons.write_persons(tmp_path, train=2, test=3, each=2))
    assert split.problems == ()
    assert {record.label for record in split.train} == {"0001", "0002"}
    assert {record.label for record in split.queries} == {"0003", "0004", "0005"}
    assert len(split.junk) == persons.JUNK
    result = evaluate_reid(TinyNet(), split)
    assert (result.skipped, result.distractors) == (0, persons.DISTRACTORS)


def test_names_without_person_and_camera_are_the_reason(tmp_path: Path) -> None:
    root = market(tmp_path)
    for path in (root / "query").glob("*.jpg"):
        path.rename(path.with_name(f"img{path.name}"))
    data = read_dataset("market1501", root, strict=False)
    with pytest.raises(ImageError, match=r"one query, .* got none \(names without person and cam"):
        evaluate_reid(as_similarity_model(TinyNet().eval()), data)

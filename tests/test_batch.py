"""Batches: as explained one by one, pictures embedded once, nothing lost, whoever does the work."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections import Counter as Counts
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import torch
from attention_cases import TinyViT
from avsl_cases import small_avsl
from batch_cases import NAMES, ROWS, SIZE, contents, drawn, tiny_model, written
from cli_runs import environment
from conftest import SharedNet, TinyNet
from pictures import noise
from PIL import Image
from torch import nn

from simexplain import (
    METHODS,
    Explanation,
    Preprocess,
    as_similarity_model,
    explain,
    explain_batch,
    open_batch,
)
from simexplain.batching.cached_model import LookaheadCache
from simexplain.batching.planning import BatchOptions, BatchRow, nearest_first, read_rows
from simexplain.batching.shards import RowExplainer
from simexplain.errors import ComparisonError, ModelError, OutputError
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.methods.weight_bank import WeightBank, probe_of

QUICK: dict[str, dict[str, Any]] = {
    "random_masks": {"masks": 6}, "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 3}, "occlusion": {"window": 0.5, "stride": 0.5},
    "sbsm": {"window": 0.5, "stride": 0.5},
}  # fmt: skip
SHARED = ("sam", "focus", "similarity_cam")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return drawn(tmp_path / "pictures")


@pytest.fixture
def table(folder: Path) -> Path:
    return written(folder / "rows.csv")


def one_by_one(
    model: nn.Module, folder: Path, row: tuple[str, str, str], method: Any = "sam", **options: Any
) -> Explanation:
    """The row as a user would explain it alone."""
    anchor, near, far = row
    positives, negatives = ([p for p in cell.split(";") if p] for cell in (near, far))
    paths = [folder / name for name in (anchor, *positives, *negatives)]
    if len(paths) == 2:
        shape: dict[str, Any] = {"arch": "siamese", "negative": not positives}
    else:
        shape = {"arch": "set", "positives": len(positives)}
    return explain(model, paths, method=method, **shape, **options)


def agree(result: Explanation, wanted: Explanation, tolerance: float = 1e-5) -> None:
    for name in ("maps", "weights", "scores", "embeddings", "distances"):
        a, b = getattr(result, name), getattr(wanted, name)
        slack = max(1e-7, tolerance * float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=slack, msg=name)
    assert list(result.layer_maps) == list(wanted.layer_maps)
    for layer, maps in wanted.layer_maps.items():
        torch.testing.assert_close(result.layer_maps[layer], maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.heatmaps, wanted.heatmaps, rtol=1e-3, atol=1e-4)
    for name in ("roles", "architecture", "warnings", "layers", "options", "method", "model"):
        assert getattr(result, name) == getattr(wanted, name), name
    assert rounded(result.peaks()) == rounded(wanted.peaks())
    assert [p.path for p in result.pictures] == [p.path for p in wanted.pictures]


def rounded(peaks: list[tuple[float, float] | None]) -> list[list[float] | None]:
    return [peak and [round(value, 2) for value in peak] for peak in peaks]


class Counter:
    """Counts the pictures that go through a network."""

    def __init__(self, network: nn.Module) -> None:
        self.seen = 0
        network.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.seen += len(output)


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("avsl", "weight_bank")]
)
def test_every_row_is_as_explained_alone(method: str, table: Path, tmp_path: Path) -> None:
    model, options = tiny_model(), QUICK.get(method, {})
    if method in ("attention", "attention_relevance", "grad_eclip"):
        model = as_similarity_model(TinyViT(), preprocess=Preprocess(SIZE), name="tiny")
    result = explain_batch(
        model, table, tmp_path / "out", method=method, how=BatchOptions(shard_rows=4), **options
    )
    assert result.work is not None
    assert result.work.shared == (method in SHARED)
    for number, row in enumerate(ROWS):
        wanted = one_by_one(model, table.parent, row, method, **options)
        agree(result.explanation(number), wanted)
        record = result.record(number)
        assert record["distances"] == pytest.approx(wanted.distances[0].tolist())
        condition = wanted.condition()
        assert (record["condition"], record["holds"]) == (condition.text, condition.holds)
        assert record["margin"] == pytest.approx(condition.margin, abs=1e-6)
        peaks = [p and (p["x"], p["y"]) for p in record["peaks"]]
        assert rounded(peaks) == rounded(wanted.peaks())
        assert record["warnings"] == list(wanted.warnings)
        torch.testing.assert_close(result.maps(number), result.explanation(number).maps[0])


@pytest.mark.parametrize("methods", [None, ["focus", "sam"], ["sam", "occlusion"]])
def test_several_rows_are_as_explained_alone(methods, table: Path, tmp_path: Path) -> None:
    model = tiny_model()
    result = explain_batch(model, table, tmp_path / "out", method=methods)
    assert result.work is not None
    assert result.work.shared == (methods != ["sam", "occlusion"])
    if result.work.shared:
        assert result.work.forwards == len(NAMES)
    for number, row in enumerate(ROWS[:4]):
        wanted = one_by_one(model, table.parent, row, methods)
        actual = result.explanation(number)
        others = result.record(number)["others"]
        assert len(actual.rows) == len(wanted.rows) == 2
        for one, other in zip(actual.rows, wanted.rows, strict=True):
            agree(one, other)
        assert [other["method"] for other in others] == [wanted.others[0].method]
        peaks = [p and (p["x"], p["y"]) for p in others[0]["peaks"]]
        assert rounded(peaks) == rounded(wanted.others[0].peaks())
    assert [row["method"] for row in result.manifest["maps"]] == [r.method for r in wanted.rows]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sam", {"weights": "signed", "layer": ("last", "norm")}),
        ("sam", {"weights": "relative", "through_weights": True, "upscale": 1.5}),
        ("sam", {"cam": "layer_cam", "layer": "stem", "keep_negative": True, "scale": "shared"}),
        ("focus", {"layer": ("stem", "body", "last"), "matching": 1.0}),
        ("similarity_cam", {"score": "held", "layer": ("norm", "last")}),
        ("similarity_cam", {"score": "dot", "upscale": 2}),
        (SimilarityAttention(weights="relative"), {"layer": "body"}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_options_mean_what_they_mean_alone(
    method: Any, options: dict[str, Any], batch_size: int, table: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    how = BatchOptions(batch_size=batch_size, shard_rows=100)
    result = explain_batch(model, table, tmp_path / "out", method=method, how=how, **options)
    assert result.work is not None
    assert result.work.shared
    assert result.work.forwards == len(NAMES) * (2 if "upscale" in options else 1)
    for number, row in enumerate(ROWS):
        agree(result.explanation(number), one_by_one(model, table.parent, row, method, **options))


@pytest.mark.parametrize("method", ["sam", "avsl", "focus"])
def test_avsl_models(method: str, folder: Path, tmp_path: Path) -> None:
    model = small_avsl()
    model.preprocess = Preprocess((32, 40))
    count = Counter(model.network)
    result = explain_batch(model, written(folder / "rows.csv"), tmp_path / "out", method=method)
    assert result.work is not None
    assert result.work.shared
    assert result.work.forwards == len(NAMES)
    assert count.seen <= len(NAMES) + 12  # the survey, the model's identity, the first row's proof
    for number, row in enumerate(ROWS):
        agree(result.explanation(number), one_by_one(model, folder, row, method))


def test_maps_from_a_bank(table: Path, tmp_path: Path) -> None:
    model = tiny_model()
    images = torch.rand(4, 3, *SIZE)
    with torch.no_grad():
        rows = model.embed(images)
    bank = WeightBank(
        rows, torch.randn(4, 12), tuple("aabb"), ("",) * 4, "tiny", "last", SIZE,
        probe_of(model, SIZE), 2.0, {},
    )  # fmt: skip
    bank.save(tmp_path / "bank.safetensors")
    options = {"method": "weight_bank", "bank": str(tmp_path / "bank.safetensors")}
    count = Counter(model.network)
    result = explain_batch(model, table, tmp_path / "out", **options)
    assert result.work is not None
    assert result.work.shared
    assert count.seen < 2 * len(NAMES) + 3  # the bank knows the model by one image, seen once
    for number, row in enumerate(ROWS):
        agree(result.explanation(number), one_by_one(model, table.parent, row, **options))


@pytest.mark.parametrize("method", ["sam", "saliency"])
def test_networks_that_take_one_number_of_pictures(
    method: str, table: Path, tmp_path: Path
) -> None:
    class Fixed(TinyNet):
        """An exported program, for instance."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) == 3
            return super().forward(images)

    torch.manual_seed(0)
    model = as_similarity_model(Fixed().eval(), preprocess=Preprocess(SIZE), batch_size=3)
    result = explain_batch(model, table, tmp_path / "out", method=method, max_batch=2)
    assert result.work is not None
    assert result.work.forwards == (len(NAMES) if method == "sam" else None)
    for number, row in enumerate(ROWS):
        agree(result.explanation(number), one_by_one(model, table.parent, row, method))


def test_shared_layers_and_calls(table: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = as_similarity_model(SharedNet().eval(), preprocess=Preprocess(SIZE))
    layers = ("act@0", "act@2")
    result = explain_batch(model, table, tmp_path / "out", layer=layers)
    assert result.work is not None
    assert result.work.shared
    for number, row in enumerate(ROWS):
        agree(result.explanation(number), one_by_one(model, table.parent, row, layer=layers))


def test_pictures_are_embedded_once(table: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.layers  # noqa: B018 - the survey runs the network, once for a model
    count = Counter(model.network)
    result = explain_batch(model, table, tmp_path / "out", how=BatchOptions(shard_rows=2))
    work, separate = result.work, sum(len(";".join(filter(None, row)).split(";")) for row in ROWS)
    assert work is not None
    assert (work.forwards, work.separate) == (len(NAMES), separate)
    # Beside them the probe that models are known by, and the first row, both ways, as a proof.
    assert count.seen == len(NAMES) + 1 + 3 + 3


def test_little_memory_costs_forwards_and_nothing_else(table: Path, tmp_path: Path) -> None:
    whole = explain_batch(tiny_model(), table, tmp_path / "whole")
    little = explain_batch(tiny_model(), table, tmp_path / "none", how=BatchOptions(memory=0))
    assert contents(tmp_path / "whole") == contents(tmp_path / "none")
    assert whole.work is not None
    assert little.work is not None
    assert whole.work.forwards == len(NAMES) < (little.work.forwards or 0)
    assert (little.work.forwards or 0) < little.work.separate


def test_the_model_and_the_caller_are_left_as_they_were(table: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.module.norm.train()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        explain_batch(model, table, tmp_path / "out")
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_networks_that_mix_the_images_of_a_batch_get_each_alone(
    table: Path, tmp_path: Path
) -> None:
    class Coupled(TinyNet):
        """The embedding of one picture depends on the others in its batch."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            rows = super().forward(images)
            return rows + rows.mean(dim=0).square()

    torch.manual_seed(0)
    model = as_similarity_model(Coupled().eval(), preprocess=Preprocess(SIZE))
    result = explain_batch(model, table, tmp_path / "out")
    assert result.work is not None
    assert result.work.shared
    for number, row in enumerate(ROWS):
        actual = result.explanation(number)
        agree(actual, one_by_one(model, table.parent, row))
        pictures = [model.preprocess(picture.image)[0] for picture in actual.pictures]
        own = [model.embed(picture[None])[0] for picture in pictures]
        torch.testing.assert_close(actual.embeddings[0], torch.stack(own))


# Rows


def test_bad_rows_are_told_and_lose_no_others(folder: Path, tmp_path: Path) -> None:
    (folder / "text.png").write_text("no picture", encoding="utf-8")
    whole = (folder / "p1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    noise(10, 900).save(folder / "strip.png")
    rows = [
        ("a", *ROWS[0]), ("b", "p0.png", "gone.png", ""), ("c", "p0.png", "", ""),
        ("d", "", "p1.png", ""), ("e", "text.png", "p1.png", ""), ("f", "cut.png", "p1.png", ""),
        ("g", "strip.png", "p1.png", ""), ("a", *ROWS[1]), ("i", "p0.png", "cut.png", "p1.png"),
        ("j", "p0.png", "p1.png", "p2.png", "too many"), ("k", *ROWS[2]),
    ]  # fmt: skip
    table = written(folder / "rows.csv", rows, ("id", "anchor", "positives", "negatives"))
    lines: list[str] = []
    model = tiny_model()
    result = explain_batch(model, table, tmp_path / "out", skipped=lines.extend)
    assert [line.split(":")[0] for line in lines] == [f"line {n}" for n in (3, 4, 5, 6, 8, 9, 11)]
    statuses = result.table["status"].to_pylist()
    assert [own for own, status in zip("abcdefghijk", statuses, strict=True) if status == "ok"] == [
        "a", "k",
    ]  # fmt: skip
    errors = result.table["error"].to_pylist()
    for number, record in (
        (1, "There is no file"), (2, "Expected a positive or a negative"),
        (3, "Expected an anchor"), (4, "is not a picture"), (5, "is damaged or cut off"),
        (6, "too elongated"), (7, "that of an earlier row"), (8, "cut.png' is damaged"),
        (9, "Expected 4 cells"),
    ):  # fmt: skip
        assert record in errors[number], errors[number]
        assert errors[number].endswith(".")
    assert result.table["id"].to_pylist() == [row[0] for row in rows]
    for number, row in ((0, ROWS[0]), (10, ROWS[2])):
        agree(result.explanation(number), one_by_one(model, folder, row))
    agree(result.explanation("k"), one_by_one(model, folder, ROWS[2]))
    with pytest.raises(ComparisonError, match="was not explained: There is no file"):
        result.maps("b")
    with pytest.raises(ComparisonError, match="0 to 10, or its id, got 'z'"):
        result.maps("z")
    with pytest.raises(ComparisonError, match=r"7 of 11 cannot: line 3: .+; line 4: .+; line 11"):
        explain_batch(model, table, tmp_path / "strict", how=BatchOptions(strict=True))
    assert not (tmp_path / "strict").exists()


def test_a_network_that_fails_on_one_row_loses_no_other(folder: Path, tmp_path: Path) -> None:
    class Picky(TinyNet):
        """Gives the zero vector for one picture, for which no distance is defined."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            alive = (images.flatten(1).std(dim=1) > 0).float()
            return super().forward(images) * alive[:, None]

    torch.manual_seed(0)
    model = as_similarity_model(Picky().eval(), preprocess=Preprocess(SIZE))
    model.preprocess = Preprocess(SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    Image.new("RGB", (40, 40), (90, 90, 90)).save(folder / "flat.png")
    rows = [BatchRow("p0.png", ("p1.png",)), BatchRow("flat.png", ("p1.png",)),
            BatchRow("p1.png", ("p2.png",), ("p0.png",))]  # fmt: skip
    result = explain_batch(model, rows, tmp_path / "out", root=folder)
    assert result.table["status"].to_pylist() == ["ok", "failed", "ok"]
    assert "embedding of the anchor" in result.failures["1"]


def test_what_strikes_once_is_no_rows_fault(table: Path, tmp_path: Path) -> None:
    """As the end of another process, of which lightning tells in the middle of anything."""

    class Struck(TinyNet):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            Struck.calls += 1
            if Struck.calls == 12:
                raise RuntimeError("Connection closed by peer")
            return super().forward(images)

    torch.manual_seed(0)
    model = as_similarity_model(Struck().eval(), preprocess=Preprocess(SIZE), name="tiny")
    result = explain_batch(model, table, tmp_path / "out", how=BatchOptions(memory=0))
    assert Struck.calls > 12
    assert result.failures == {}
    explain_batch(tiny_model(), table, tmp_path / "calm")
    assert (
        contents(tmp_path / "out")["results.parquet"]
        == contents(tmp_path / "calm")["results.parquet"]
    )


@pytest.mark.parametrize(
    ("header", "row", "positives", "negatives"),
    [
        (("anchor", "positives", "negatives"), ("a", " b ; c;", "d"), ("b", "c"), ("d",)),
        (("Anchor", "positive", "positive2"), ("a", "b;1", "c"), ("b;1", "c"), ()),
        (("negative10", "negative2", "negative", "anchor"), ("3", "2", "1", "a"), (), tuple("123")),
        (("anchor", "positives", "positive", "anchor_mask"), ("a", "b", "c", "m"), ("b", "c"), ()),
    ],
)
def test_columns(
    header: tuple[str, ...],
    row: tuple[str, ...],
    positives: tuple[str, ...],
    negatives: tuple[str, ...],
    tmp_path: Path,
) -> None:
    (result,), root = read_rows(written(tmp_path / "rows.csv", [row, ()], header))
    assert (result.anchor, result.positives, result.negatives) == ("a", positives, negatives)
    assert (result.id, result.line, result.problem) == ("0", 2, "")
    assert root == tmp_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no 'anchor'"),
        ("anchor,positives\n", "at least one row"),
        ("anchor;positives\na;b\n", "semicolons between columns; save it with commas"),
        ("anchor,postives\na,b\n", "got 'postives'"),
        ("anchor,id\na,b\n", "no 'positives'"),
        ("anchor,positives,anchor\na,b,c\n", "'anchor' twice"),
        ('anchor,positives\n"a,b\n', "not a CSV file in UTF-8"),
    ],
)
def test_files_that_are_no_tables(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ComparisonError, match=said):
        explain_batch(tiny_model(), tmp_path / "rows.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_from_python_are_those_of_a_file(table: Path, tmp_path: Path) -> None:
    rows = [
        {"anchor": a, "positives": p.split(";") if p else None, "negatives": n.split(";")[: len(n)]}
        for a, p, n in ROWS
    ]  # fmt: skip
    explain_batch(tiny_model(), table, tmp_path / "file")
    explain_batch(tiny_model(), rows, tmp_path / "python", root=table.parent)
    ours, theirs = (open_batch(tmp_path / name).table for name in ("file", "python"))
    assert ours.drop_columns("line").equals(theirs.drop_columns("line"))
    for bad, record in (
        ([{"anchor": "a", "positve": "b"}], "'positve'"),
        ([3], r"got \[3\]"),
        ([], "none"),
    ):
        with pytest.raises(ComparisonError, match=record):
            explain_batch(tiny_model(), bad, tmp_path / "bad")


def test_one_file_under_two_names_is_one_picture(folder: Path, tmp_path: Path) -> None:
    (folder / "link.png").symlink_to(folder / "p0.png")
    rows = [BatchRow("p0.png", ("p1.png",)), BatchRow("./link.png", (str(folder / "p1.png"),))]
    result = explain_batch(tiny_model(), rows, tmp_path / "out", root=folder)
    assert result.work is not None
    assert result.work.forwards == 2
    assert result.table["anchor"].to_pylist() == ["p0.png", "./link.png"]
    assert result.table["pictures"].to_pylist() == [[0, 1], [0, 1]]


# Stopping and going on


KILLED = """
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from attention_cases import TinyViT
from batch_cases import tiny_model
from simexplain import explain_batch
from simexplain.batching.planning import BatchOptions
import simexplain.batching.batching, simexplain.methods, pyarrow.parquet, safetensors.torch

def killed_at(count):
    sync = os.fsync
    def struck(number):
        nonlocal count
        count -= 1
        if count < 0:  # a file is written, but not yet in its place
            os.kill(os.getpid(), signal.SIGKILL)
        sync(number)
    os.fsync = struck

table, out, points = sys.argv[1], Path(sys.argv[2]), [int(n) for n in sys.argv[3:]]
for number, point in enumerate(points):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        killed_at(point)
        explain_batch(tiny_model(), table, out, resume=(out / "batch.json").exists(),
                      how=BatchOptions(shard_rows=2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status), len(list(out.glob("parts/shard*"))), flush=True)
"""


def test_killed_and_resumed_at_random_points(table: Path, tmp_path: Path) -> None:
    how = BatchOptions(shard_rows=2)
    whole = explain_batch(tiny_model(), table, tmp_path / "whole", how=how)
    draws = random.Random(7)
    points = [draws.randrange(1, 4) for _ in range(4)]
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, table, tmp_path / "out", *map(str, [0, *points])],
        capture_output=True, text=True, timeout=200, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert lines[0] == (9, 0)  # while the manifest was written
    assert all(signal == 9 for signal, _ in lines), lines
    finished = [count for _, count in lines]
    assert finished == sorted(finished)
    assert 0 < finished[-1] < 5, finished
    assert any(p.name.startswith(".simexplain-") for p in (tmp_path / "out").rglob("*"))
    stood = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("parts/shard*")}
    assert stood
    result = explain_batch(tiny_model(), table, tmp_path / "out", how=how, resume=True)
    assert result.work is not None
    assert whole.work is not None
    assert result.work.rows < whole.work.rows
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert result.manifest == whole.manifest


def test_ctrl_c_leaves_whole_shards(table: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "Explaining" and done == 5:
            raise KeyboardInterrupt

    how = BatchOptions(shard_rows=2)
    with pytest.raises(KeyboardInterrupt):
        explain_batch(tiny_model(), table, tmp_path / "out", how=how, progress=stop)
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2
    assert not (tmp_path / "out" / "results.parquet").exists()
    with pytest.raises(OutputError, match="is not done; go on with it"):
        open_batch(tmp_path / "out")
    seen: list[int] = []
    result = explain_batch(
        tiny_model(), table, tmp_path / "out", how=how, resume=True,
        progress=lambda what, done, total: seen.append(total) if what == "Explaining" else None,
    )  # fmt: skip
    assert seen == [len(ROWS) - 4] * (len(ROWS) - 4)
    explain_batch(tiny_model(), table, tmp_path / "whole", how=how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = explain_batch(tiny_model(), table, tmp_path / "out", how=how, resume=True)
    assert again.work is None
    assert again.table.equals(result.table)


def stopped(table: Path, out: Path, **options: Any) -> None:
    """A batch of which one shard is done."""

    def stop(what: str, done: int, total: int) -> None:
        if what == "Explaining" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain_batch(
            tiny_model(), table, out, how=BatchOptions(shard_rows=2), progress=stop, **options
        )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "focus"}, "method='the default'"),
        ({"layer": "body"}, "layer="),
        ({"weights": "signed"}, "option weights"),
        ({"upscale": 2}, "upscale=1"),
        ({"scale": "shared"}, "scale='image'"),
        ({"how": BatchOptions(shard_rows=3)}, "shard_rows=2"),
        ({"how": BatchOptions(shard_rows=2, figures=True)}, "figures=False"),
    ],
)
def test_other_options_are_refused_on_resume(
    changed: dict[str, Any], said: str, table: Path, tmp_path: Path
) -> None:
    stopped(table, tmp_path / "out")
    before = contents(tmp_path / "out")
    options: dict[str, Any] = {"how": BatchOptions(shard_rows=2), **changed}
    with pytest.raises(ModelError, match=f"begun (with|without) {said}"):
        explain_batch(tiny_model(), table, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == before


def test_other_models_rows_and_pictures_are_refused_on_resume(table: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "out", BatchOptions(shard_rows=2)
    stopped(table, out)
    other = tiny_model()
    other.preprocess = Preprocess(SIZE, fit="squash")
    for model in (tiny_model(seed=1), other):
        with pytest.raises(ModelError, match="other weights or preprocessing"):
            explain_batch(model, table, out, how=how, resume=True)
    fewer = written(table.parent / "fewer.csv", ROWS[:-1])
    with pytest.raises(OutputError, match="begun with other rows"):
        explain_batch(tiny_model(), fewer, out, how=how, resume=True)
    noise(50, 50, seed=99).save(table.parent / "p3.png")
    with pytest.raises(OutputError, match=r"p3.png' is not what it was"):
        explain_batch(tiny_model(), table, out, how=how, resume=True)
    with pytest.raises(OutputError, match="say --resume to go on with it, --force to replace"):
        explain_batch(tiny_model(), table, out, how=how)
    result = explain_batch(tiny_model(), table, out, how=how, force=True)
    with pytest.raises(OutputError, match="Expected a batch to resume"):
        explain_batch(tiny_model(), table, tmp_path / "new", resume=True)
    noise(51, 51, seed=9).save(table.parent / "p0.png")
    with pytest.raises(OutputError, match=r"p0.png' is not what it was when the batch was made"):
        result.explanation(0)
    assert result.maps(0).shape[0] == 3  # which need no picture


def test_force_replaces_a_batch_and_nothing_else(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = BatchOptions(shard_rows=1, pictures=True, figures=True)
    explain_batch(tiny_model(), written(table, ROWS[:2]), out, how=how)
    assert len(list((out / "figures").iterdir())) == 2
    assert (out / "heatmaps" / "000000_2_negative.png").exists()
    assert len(list((out / "maps").iterdir())) == 2
    (out / "maps" / "mine.txt").write_text("kept", encoding="utf-8")
    (out / "notes.txt").write_text("kept", encoding="utf-8")
    explain_batch(tiny_model(), table, out, force=True)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "batch.json", "results.parquet", "maps/shard_00000.safetensors", "maps/mine.txt",
        "notes.txt",
    }  # fmt: skip
    (out / "results.parquet").write_bytes(b"damaged")
    with pytest.raises(OutputError, match="cannot be read"):
        len(open_batch(out))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        explain_batch(tiny_model(), table, tmp_path / "file")


def test_two_runs_never_work_on_one_folder(table: Path, tmp_path: Path) -> None:
    """A second run is refused wherever it comes upon the first, which ends as if it were alone."""
    out, how = tmp_path / "out", BatchOptions(shard_rows=2)
    refused = []

    def struck(what: str, done: int, total: int) -> None:
        if what == "Explaining" and done == 3:
            for again in ({"resume": True}, {"force": True}):
                with pytest.raises(OutputError, match="Another process works on the batch") as why:
                    explain_batch(tiny_model(), table, out, how=how, **again)
                refused.append(why)

    def overtaken(what: str, done: int, total: int) -> None:
        """Both find nothing there, and the other begins first."""
        if what == "Checking pictures" and not out.exists():
            explain_batch(tiny_model(), table, out, how=how, progress=struck)

    with pytest.raises(OutputError, match="holds a batch already"):
        explain_batch(tiny_model(), table, out, how=how, method="focus", progress=overtaken)
    assert len(refused) == 2
    explain_batch(tiny_model(), table, tmp_path / "whole", how=how)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_batch_that_another_run_has_ended_is_left_as_it_is(table: Path, tmp_path: Path) -> None:
    """Here the other one ends between the look whether it is done and the work."""
    out, how = tmp_path / "out", BatchOptions(shard_rows=2)
    stopped(table, out)
    done, proof = [], RowExplainer.check_sharing

    def proven(self: RowExplainer) -> Explanation:
        result = proof(self)
        if not done:
            done.append(True)
            explain_batch(tiny_model(), table, out, how=how, resume=True)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowExplainer, "check_sharing", proven)
        explain_batch(tiny_model(), table, out, how=how, resume=True)
    explain_batch(tiny_model(), table, tmp_path / "whole", how=how)
    assert contents(out) == contents(tmp_path / "whole")


def test_failed_rows_in_a_batch_of_their_own_as_the_docs_say(folder: Path, tmp_path: Path) -> None:
    good = (folder / "p1.png").read_bytes()
    (folder / "p1.png").write_bytes(good[:200])
    batch = explain_batch(tiny_model(), written(folder / "rows.csv"), tmp_path / "out")
    failed = [row for row in batch.table.to_pylist() if row["status"] == "failed"]
    assert 0 < len(failed) < len(ROWS)
    (folder / "p1.png").write_bytes(good)
    rows = [{key: row[key] for key in ("id", "anchor", "positives", "negatives")} for row in failed]
    again = explain_batch(tiny_model(), rows, tmp_path / "again", root=batch.manifest["root"])
    assert not again.failures
    assert again.table["id"].to_pylist() == list(batch.failures)


def test_strict_lists_no_more_than_can_be_read(folder: Path, tmp_path: Path) -> None:
    rows = [{"anchor": "p0.png", "positives": f"gone{number}.png"} for number in range(50)]
    with pytest.raises(ComparisonError, match=r"gone19\.png.* and 30 more\.$") as caught:
        explain_batch(tiny_model(), rows, tmp_path / "out", root=folder,
                      how=BatchOptions(strict=True))  # fmt: skip
    assert "gone20" not in str(caught.value)


def test_a_damaged_shard_is_done_again(table: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "out", BatchOptions(shard_rows=2)
    stopped(table, out)
    (part,) = (out / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:50])
    explain_batch(tiny_model(), table, out, how=how, resume=True)
    explain_batch(tiny_model(), table, tmp_path / "whole", how=how)
    assert contents(out) == contents(tmp_path / "whole")


# What cannot be done


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for options, kind, record in (
        ({"method": "nope"}, ComparisonError, "method to be one of"),
        ({"layer": "nope"}, ModelError, "no layer 'nope'"),
        ({"weights": "nope"}, ComparisonError, "weights to be one of"),
        ({"upscale": 0}, ComparisonError, "upscale between"),
        ({"method": "avsl"}, ModelError, "Expected an AVSL model"),
        ({"method": "saliency", "layer": "body"}, ModelError, "takes no layer"),
        ({"scale": "huge"}, ComparisonError, "scale to be one of"),
    ):
        with pytest.raises(kind, match=record):
            explain_batch(tiny_model(), table, out, **options)  # type: ignore[arg-type]
        assert not out.exists(), options
    for wrong in ({"shard_rows": 0}, {"memory": -1}, {"accelerator": "abacus"}):
        with pytest.raises(ComparisonError):
            BatchOptions(**wrong)
    with pytest.raises(ComparisonError, match="None of 1 rows can be explained, the first because"):
        explain_batch(tiny_model(), [BatchRow("a", ("b",))], out)
    for missing, devices, extra in (("pyarrow", None, "search"), ("lightning", 2, "train")):
        find = "simexplain.batching.folder" if devices is None else "simexplain.batching.shards"
        monkeypatch.setattr(f"{find}.find_spec", lambda name: None)
        with pytest.raises(ModelError, match=rf"{missing} for .+'simexplain\[{extra}\]'"):
            explain_batch(tiny_model(), table, out, how=BatchOptions(devices=devices))
        monkeypatch.undo()
    assert not out.exists()


# Parts


def test_what_is_needed_last_goes_first() -> None:
    uses = {"a": [0, 9], "b": [1, 2], "c": [2, 3], "d": [3]}
    keep: LookaheadCache[str] = LookaheadCache(20, lambda key: uses[key])  # type: ignore[index]
    made = []

    def take(key: str) -> None:
        keep.take(key, lambda: (made.append(key) or key, 10))  # type: ignore[func-returns-value]

    for now, keys in enumerate(("a", "b", "bc", "cd")):
        keep.now = now
        for key in keys:
            take(key)
        keep.release()
    assert made == ["a", "b", "c", "d"]  # b stayed for c's row, a went
    keep.now = 9
    take("a")
    assert made[-1] == "a"
    keep.release()
    assert len(keep) == keep.bytes == 0


def test_rows_that_share_pictures_come_together() -> None:
    rows = {
        n: tuple(map(Path, paths)) for n, paths in enumerate(("ab", "xy", "cd", "yz", "bc", "z"))
    }
    assert nearest_first(rows) == [0, 4, 2, 1, 3, 5]
    assert nearest_first({}) == []


def test_the_manifest_says_what_was_done(table: Path, tmp_path: Path) -> None:
    explain_batch(tiny_model(), table, tmp_path / "out", weights="signed")
    record = json.loads((tmp_path / "out" / "batch.json").read_text(encoding="utf-8"))
    assert record["settings"]["option weights"] == "signed"
    assert record["options"]["weights"] == "signed"
    assert (record["method"], record["layers"], record["rows"]) == ("sam", ["last"], len(ROWS))
    summary = open_batch(tmp_path / "out").to_json()
    assert (summary["explained"], summary["failed"], summary["pictures"]) == (len(ROWS), 0, 8)


def test_the_benchmark_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("batch")
    rows = benchmark.triplets([Path(str(number)) for number in range(4)], 12)
    uses = Counts(path for row in rows for path in row.paths)
    assert sum(uses.values()) == 36
    assert max(uses.values()) - min(uses.values()) <= 4
    assert all(len(set(row.paths)) == 3 for row in rows)
    result = benchmark.measure(tiny_model(), "sam", 3, 6, 1, 2)
    assert (result.pictures, result.forwards, result.separate) == (6, 6, 18)
    assert result.error < 1e-5
    monkeypatch.setattr(benchmark, "SHARING", (3,))
    page = benchmark.page([result], benchmark.remembered(tiny_model(), 6), "")
    assert "| sam | 3 | 6 | 6 | 18 | 6 |" in page


def test_a_table_that_names_maps_elsewhere_is_refused(table: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    done = explain_batch(tiny_model(), table, tmp_path / "batch")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((done.folder / done.record(0)["maps_file"]).read_bytes())
    rows = pq.read_table(done.folder / "results.parquet")
    index = rows.column_names.index("maps_file")
    for name in ("../outside.safetensors", str(outside), "maps/../../outside.safetensors"):
        forged = rows.set_column(index, "maps_file", [[name] * len(rows)])
        pq.write_table(forged, done.folder / "results.parquet")
        with pytest.raises(OutputError, match="Expected maps of the batch"):
            open_batch(done.folder).explanation(0)


def test_nothing_is_written_or_removed_through_a_link(table: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shard_00000.safetensors").write_text("mine")
    (tmp_path / "batch").mkdir()
    (tmp_path / "batch" / "maps").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(OutputError, match="link to elsewhere"):
        explain_batch(tiny_model(), table, tmp_path / "batch", force=True)
    assert (elsewhere / "shard_00000.safetensors").read_text() == "mine"

"""Every page of measurements follows from the store of records."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pages  # noqa: E402
import store  # noqa: E402


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_what_its_record_says(name: str) -> None:
    for package in ("skimage", "timm"):
        pytest.importorskip(package)
    assert pages.file_of(name).read_text(encoding="utf-8") == pages.page(name)


def test_every_page_and_every_record_is_in_the_table() -> None:
    written = {pages.file_of(name) for name in pages.PAGES}
    assert {*(ROOT / "docs" / "benchmarks").iterdir()} <= written
    assert {*(ROOT / "docs").glob("*results.md")} <= written
    of_others = {"trained_pointing", "training_runs"}
    assert {path.stem for path in store.RECORDS.iterdir()} == (
        {*pages.PAGES} - {"kinds"} | of_others
    )
    assert sum(path.stat().st_size for path in store.RECORDS.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", pages.NUMBERS)
def test_numbers_of_tables_are_cells_of_the_record(name: str) -> None:
    """Another number in the store is another number on the page."""
    record = store.load(name)
    tables = [part for part in record if isinstance(part, list)]
    assert all(len({len(row) for row in table}) == 1 for table in tables)
    number = next(
        (table, row, place)
        for table in tables
        for row in table[2:]
        for place, cell in enumerate(row)
        if re.search(r"\d\.\d|\de-\d", cell)
    )
    _, row, place = number
    row[place] = "12345.678"
    assert "| 12345.678 |" in store.page_of(record)


def test_pages_are_written_and_numbers_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(store, "RECORDS", tmp_path / "records")
    text = "# Title\n\n| a | |\n| --- | --- |\n| 1.0 ± 0.1 | |\n\nEnd.\n"
    store.publish(text, tmp_path / "docs" / "benchmarks" / "one.md")
    assert store.page_of(store.load("one")) == text
    store.publish(text, tmp_path / "docs" / "benchmarks" / "two.md", numbers=False)
    store.publish(text, tmp_path / "elsewhere" / "three.md")
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["one.json"]
    assert store.load("two") == {}
    store.publish(text, None)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "DOCS", tmp_path / "docs")
    (tmp_path / "docs" / "benchmarks" / "training.md").write_text("old")
    monkeypatch.setattr(pages, "load", lambda name: ["new", ""])
    pages.main(["training"])
    assert (tmp_path / "docs" / "benchmarks" / "training.md").read_text() == "new\n"

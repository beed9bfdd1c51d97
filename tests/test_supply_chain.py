"""What an installation brings is pinned, and what is built is what lies in the repository."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = [f"3.{minor}" for minor in (10, 11, 12, 13)]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    path = ROOT / "docs" / "scripts" / "audit.py"
    spec = importlib.util.spec_from_file_location("audit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def required() -> set[str]:
    """Names in pyproject.toml: dependencies, and those of the extras of ``dev``."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = re.fullmatch(r"simexplain\[(.*)\]", extras["dev"][0])
    assert own is not None
    texts = [*project["dependencies"], *extras["dev"][1:]]
    texts += [text for name in own[1].split(",") for text in extras[name]]
    return {re.split(r"[\[<>=!~; ]", text)[0] for text in texts}


def test_every_dependency_is_pinned_and_has_a_hash(audit: ModuleType) -> None:
    pins = audit.pins_of(audit.PINS.read_text(encoding="utf-8"))
    assert {audit.normal(name) for name in required()} <= pins.keys()
    hashes = audit.hashes_of(audit.HASHES.read_text(encoding="utf-8"))
    assert {audit.normal(name) for name in required()} <= {name for name, _ in hashes}
    for (name, version), digests in hashes.items():
        assert pins[name] == version
        assert digests
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
    for path in (audit.PINS, audit.HASHES):
        assert "://" not in path.read_text(encoding="utf-8")


def test_what_differs_is_found(audit: ModuleType) -> None:
    report = {
        "install": [
            {
                "metadata": {"name": name, "version": version},
                "download_info": {"archive_info": {"hashes": {"sha256": digest}}},
            }
            for name, version, digest in (
                ("good_one", "1.0", "aa"), ("moved", "2.0", "bb"), ("forged", "1.0", "cc"),
                ("new", "1.0", "dd"), ("simexplain", "0.1.0", ""),
            )
        ]
    }  # fmt: skip
    files = audit.resolved(report)
    pins = audit.pins_of("Good.One==1.0  # why\nmoved==1.9\nforged==1.0\nnew==1.0\n")
    text = "good-one==1.0 sha256:aa sha256:ee\nforged==1.0 sha256:ff\nmoved==2.0 sha256:bb\n"
    known = audit.hashes_of(text)
    lines = list(audit.faults(files, pins, known))
    assert len(lines) == 3
    assert "forged 1.0 is not one of those recorded" in lines[0]
    assert lines[1].startswith("moved 2.0 is not pinned")
    assert lines[2].startswith("new 1.0 has no line")
    again = audit.hashes_of(audit.merged(files, known))
    assert again[("good-one", "1.0")] == {"aa", "ee"}
    assert again[("forged", "1.0")] == {"cc", "ff"}
    assert list(audit.faults(files, {**pins, "moved": "2.0"}, again)) == []


def test_what_advisories_know(audit: ModuleType) -> None:
    unknown = {"name": "a", "version": "1", "skip_reason": "not found"}
    sound = {"name": "b", "version": "2", "vulns": []}
    faulty = {"name": "c", "version": "3", "vulns": [{"id": "X-1", "fix_versions": ["3.1"]}]}
    assert audit.judged([unknown]) == (
        [], "Skipped the advisories: their source knows none of 1 versions."
    )  # fmt: skip
    lines, text = audit.judged([unknown, sound, faulty])
    assert lines == ["c 3: X-1, mended in 3.1."]
    assert text.startswith("2 versions were looked up")
    assert "does not know a 1" in text


@pytest.mark.parametrize("line", ["torch>=2", "torch", "torch==2 --hash=x", "-r other.txt"])
def test_a_line_that_pins_nothing_is_refused(audit: ModuleType, line: str) -> None:
    with pytest.raises(ValueError, match="name==version"):
        audit.pins_of(f"numpy==2.0\n{line}\n")


def test_sources_are_written_for_the_oldest_python() -> None:
    folders = ("simexplain", "cli", "tests", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def built(what: str, source: Path, to: Path) -> Path:
    """A wheel or an sdist of a tree, made as pip makes it, but without a network."""
    to.mkdir(parents=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(to)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    return next(to.iterdir())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the repository, without what was built in it."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("simexplain", "cli"):
        unbuilt = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=unbuilt)
    return tree


def test_the_wheel_has_the_sources_and_the_sdist_makes_the_same(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    direct = contents(built("wheel", tree, tmp_path / "direct"))
    with tarfile.open(built("sdist", tree, tmp_path / "sdist")) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert contents(built("wheel", unpacked, tmp_path / "again")) == direct
    expected = {
        str(Path(package, path.relative_to(ROOT / folder))): path.read_bytes()
        for folder, package in (("simexplain", "simexplain"), ("cli", "simexplain_cli"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    own = {name: content for name, content in direct.items() if ".dist-info/" not in name}
    assert own == expected
    about = {Path(name).name for name in direct if ".dist-info/" in name}
    assert {"METADATA", "WHEEL", "entry_points.txt", "LICENSE"} <= about


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHERS)
def test_another_python_explains(tree: Path, tmp_path: Path, version: str) -> None:
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", "pass"], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    subprocess.run([found, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    words = [python, "-m", "pip", "install", "--quiet", f"{tree}[demo]"]
    install = subprocess.run(words, capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"it cannot be installed for Python {version}: {install.stderr[-200:]}")
    command = [python, "-m", "simexplain_cli.main", "demo", "--out", tmp_path / "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "explanation.png").stat().st_size > 10_000

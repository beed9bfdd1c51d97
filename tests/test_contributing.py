"""Every recipe of CONTRIBUTING.md, built from the page itself in a copy of the packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COPIED = ("simexplain", "cli", "tests", "docs", "benchmarks")
BLOCK = re.compile(r'^```python title="(?P<file>[^":]+)(?:: (?P<table>\w+))?"\n(?P<code>.*?)^```$',
                   re.S | re.M)  # fmt: skip
CHECKS: dict[str, Callable[[Path], None]] = {}
"""By the heading of a recipe what it promises."""


def recipes() -> dict[str, list[re.Match[str]]]:
    """The blocks of each recipe by its heading."""
    section = PAGE.partition("\n## How to add\n")[2].partition("\n## ")[0]
    parts = re.split(r"^\*\*(.+?)\.\*\*", section, flags=re.M)[1:]
    return {n: list(BLOCK.finditer(text)) for n, text in zip(parts[::2], parts[1::2], strict=True)}


def apply(block: re.Match[str], following: str | None, tree: Path) -> None:
    """Adds a block to its file: a new file, lines of a table, or code before the next table."""
    path, code = tree / block["file"], block["code"]
    if not path.exists():
        path.write_text(code, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    if block["table"] is None:
        start = re.search(rf"^{following}\b", text, re.M)
        assert start is not None, f"{path} has no table {following}"
        at, added = start.start(), f"{code}\n\n"
    else:
        imports = re.match(r"(?:(?:from|import) .*\n)*", code)[0]
        text = text.replace("annotations\n", f"annotations\n\n{imports}", 1)
        code = code.removeprefix(imports).lstrip("\n")
        table = block["table"]
        if found := re.search(rf"^{table}\b.* = [\[{{]", text, re.M):
            at, added = found.end(), f"\n{code.rstrip().removesuffix(',')},\n"
        else:
            start = re.search(rf"^class {table}\b.*?(?=^    def )", text, re.S | re.M)
            assert start is not None, f"{path} has no table and no class {table}"
            at, added = start.end(), f"{code}\n"
    path.write_text(text[:at] + added + text[at:], encoding="utf-8")


def checks(heading: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[heading] = check
        return check

    return add


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong with each recipe: all are added to one copy and tried by one process."""
    tree = tmp_path_factory.mktemp("added")
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, tree)
    (tree / "simexplain_cli").symlink_to("cli")
    for blocks in recipes().values():
        for number, block in enumerate(blocks):
            rest = blocks[number + 1 :]
            apply(block, rest[0]["table"] if rest else None, tree)
    folders = [tree, *(tree / name for name in ("tests", "benchmarks", "docs", "docs/scripts"))]
    done = subprocess.run(
        [sys.executable, Path(__file__).name, tree],
        cwd=tree / "tests",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("heading", recipes())
def test_a_recipe_of_the_page_gives_what_it_promises(heading: str, results: dict[str, str]) -> None:
    assert results[heading] == ""


def test_every_recipe_is_one_file_and_one_line() -> None:
    for heading, blocks in recipes().items():
        lines = [block for block in blocks if block["table"]]
        files = [block for block in blocks if not block["table"]]
        assert len(lines) <= 1, heading
        assert len(files) <= 1, heading
        assert lines or files, heading
    assert list(recipes()) == list(CHECKS)


# ------------------------------------------------------------- in the process, over the copy


def shown(command: str) -> str:
    """All the help of a command."""
    from click.testing import CliRunner
    from simexplain_cli.main import cli

    result = CliRunner().invoke(cli, [*command.split(), "--help-all"])
    return re.sub(r"\s+", " ", result.output)


def collected(*files: str) -> str:
    """What pytest would run of these files."""
    names: list[str] = []
    plugin = SimpleNamespace(
        pytest_collection_modifyitems=lambda items: names.extend(item.nodeid for item in items)
    )
    code = pytest.main(
        ["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", *files], [plugin]
    )
    assert code == 0
    return "\n".join(names)


def explained(**options: Any) -> Any:
    import torch
    from conftest import TinyNet

    from simexplain import Comparison, explain

    images = torch.rand(2, 3, 32, 32)
    return explain(TinyNet().eval(), Comparison.pair(images[:1], images[1:]), **options)


@checks("A CAM formula")
def cam(tree: Path) -> None:
    assert "positive_cam" in shown("explain")
    assert "positive_cam" in collected("test_cams.py")
    assert float(explained(cam="positive_cam").maps.max()) > 0


@checks("A weight rule")
def weights(tree: Path) -> None:
    assert "exponential: exp(-|a-p|) and |a-n|" in shown("explain")
    assert explained(weights="exponential").weights.isfinite().all()


@checks("A method")
def method(tree: Path) -> None:
    import hooks
    from faithfulness_rows import ROWS

    from simexplain.models.blackbox import PIXEL_METHODS

    assert "brightness" in shown("explain")
    assert "[brightness]" in collected("test_methods_contract.py")
    assert "brightness" in PIXEL_METHODS
    assert "brightness" in ROWS
    row = next(line for line in hooks._table_of_methods().splitlines() if "`brightness`" in line)
    assert "How bright each pixel is" in row
    assert "`power=1.0`" in row
    assert float(explained(method="brightness", power=2.0).maps.min()) == 0


@checks("A model zoo")
def zoo(tree: Path) -> None:
    from simexplain import load_model

    model = load_model("tiny:7", weights="random")
    assert model.preprocess.size == (32, 32)


@checks("A model hub")
def hub(tree: Path) -> None:
    from simexplain import load_model

    assert load_model("shelf:any").preprocess.size == (32, 32)


@checks("A normalisation of CAMs for AVSL")
def certainty(tree: Path) -> None:
    from simexplain.models.avsl_options import AVSLOptions

    assert AVSLOptions(certainty="sum").certainty == "sum"
    assert "sum" in collected("test_avsl_graph.py", "test_avsl.py")


@checks("A reading of AVSL")
def reading(tree: Path) -> None:
    from simexplain.models.avsl_options import AVSLOptions

    assert AVSLOptions(damping=0.5).to_json()["damping"] == 0.5


@checks("A row of the benchmark of methods")
def row(tree: Path) -> None:
    from faithfulness_rows import contestants

    assert "decomposition, mid" in contestants(["decomposition"], bank=False)[0]


@checks("A kind of scene")
def scene(tree: Path) -> None:
    assert "crowded" in collected("test_benchmark_scenes.py")


@checks("A recipe")
def recipe(tree: Path) -> None:
    from simexplain.training.recipes import RECIPES, recipe_page

    assert RECIPES["folder-margin"].options.loss == "margin"
    assert "folder-margin" in recipe_page()
    assert "Wu et al. 2017" in recipe_page()


@checks("A setting of training")
def setting(tree: Path) -> None:
    from simexplain.errors import ModelError
    from simexplain.training.options import TrainOptions

    assert "--patience" in shown("train")
    assert "no better one" not in shown("train")
    with pytest.raises(ModelError, match="patience of at least 0 and at most 99, got 100"):
        TrainOptions(patience=100)
    assert "patience" in (TrainOptions.__doc__ or "")


@checks("Another name for an option, an argument or a key")
def renaming(tree: Path) -> None:
    import warnings

    from simexplain_cli.main import cli

    from simexplain import load_model

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert load_model("tiny:5", weights="random", pixels_wide=(8, 8)).preprocess.size == (8, 8)
    layers = cli.get_command(None, "layers")
    words = ["tiny:5", "--pixels-wide", "16"]
    assert layers.make_context("layers", words).params["size"] == (16, 16)


@checks("A figure")
def figure(tree: Path) -> None:
    import numpy as np
    from figures import assert_tidy
    from simexplain.rendering.two_pictures import two_pictures

    sheet = two_pictures(np.zeros((9, 9, 3), np.uint8), np.full((9, 18, 3), 255, np.uint8))
    assert_tidy(sheet.figure)


@checks("A renderer")
def renderer(tree: Path) -> None:
    assert "dimmed" in shown("explain")
    assert "dimmed" in shown("compare")


@checks("A result type")
def result(tree: Path) -> None:
    import torch
    from simexplain.evaluation.brightness import BrightnessScores

    from simexplain.errors import OutputError

    made = BrightnessScores(("a", "b"), torch.tensor([0.25, 0.5]))
    made.save(tree / "scores")
    again = BrightnessScores.load(tree / "scores")
    assert again.names == ("a", "b")
    assert again.means.equal(made.means)
    assert again.to_json()["means"] == {"a": 0.25, "b": 0.5}
    with pytest.raises(OutputError):
        made.save(tree / "scores")


@checks("A command")
def command(tree: Path) -> None:
    from click.testing import CliRunner
    from PIL import Image
    from simexplain_cli.main import cli

    assert "brightness" in CliRunner().invoke(cli, ["--help"]).output
    Image.new("RGB", (2, 2), "white").save(tree / "w.png")
    words = ["brightness", str(tree / "w.png"), "--out", str(tree / "bright"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert json.loads(done.output)["means"] == {str(tree / "w.png"): 1.0}
    assert (tree / "bright" / "brightness.npz").is_file()
    assert "[brightness]" in collected("test_cli_options.py")


@checks("A term of an objective")
def term(tree: Path) -> None:
    import torch
    from simexplain.losses.spread import Spread

    batch: Any = SimpleNamespace(embeddings=torch.eye(4))
    assert float(Spread()(batch)) == 0.25


@checks("A metric loss")
def loss(tree: Path) -> None:
    from simexplain.losses.metric_losses import metric_loss

    assert "ntxent" in shown("train")
    assert metric_loss("ntxent", 4, 8, temperature=0.5).loss.temperature == 0.5


@checks("A data set")
def data_set(tree: Path) -> None:
    from PIL import Image

    from simexplain.data.datasets import read_dataset

    (tree / "flowers").mkdir()
    for name in ("rose_1", "rose_2", "tulip_1", "tulip_2"):
        Image.new("RGB", (8, 8)).save(tree / "flowers" / f"{name}.png")
    split = read_dataset("flowers", tree / "flowers")
    assert [record.label for record in split.queries] == ["tulip", "tulip"]
    assert "flowers" in shown("train")
    assert "flowers" in shown("evaluate retrieval")


@checks("Random views for training")
def views(tree: Path) -> None:
    assert "mirrored" in shown("train")
    assert "mirrored" in collected("test_training_data.py")


@checks("A way from a map to a mask")
def refinement(tree: Path) -> None:
    assert "hottest" in shown("segment")
    assert "hottest" in collected("test_segmentation.py")


@checks("A decision with a picture")
def decision(tree: Path) -> None:
    from make_pictures import DECISIONS

    assert [row.options for row in DECISIONS["upscaling"]] == [{}, {"upscale": 2}]


@checks("A network of the matrix")
def network(tree: Path) -> None:
    assert "timm resnet10t" in collected("compat/test_matrix.py")


def main() -> None:
    """Tries all recipes and prints what went wrong with each."""
    import simexplain

    tree = Path(sys.argv[1])
    assert Path(simexplain.__file__).is_relative_to(tree)
    outcome = {}
    for heading, check in CHECKS.items():
        outcome[heading] = ""
        try:
            check(tree)
        except BaseException:
            outcome[heading] = traceback.format_exc()[-1500:]
    sys.stdout.write(f"{json.dumps(outcome)}\n")


if __name__ == "__main__":
    main()

"""The documentation: it builds strictly, lists what there is, and its code runs."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from simexplain_cli.main import COMMANDS, cli

import simexplain
from simexplain.option_fields import declared
from simexplain.renaming import RENAMED_OPTIONS
from simexplain.training.options import TrainOptions

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "simexplain" / "data" / "demo"
TAUGHT = (ROOT / "README.md", ROOT / "docs" / "quick-start.md")
TRAINING = (ROOT / "docs" / "training.md", ROOT / "docs" / "training-avsl.md")
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocs_click", "latex2mathml")
MISSING = [name for name in NEEDED if find_spec(name) is None]
_BLOCK = re.compile(r"(?P<skip><!-- not run: .+? -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.S | re.M)  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed; pip install 'simexplain[docs]'")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", target],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_command_and_its_options_are_in_the_reference(site: Path) -> None:
    page = text_of(site / "commands.html")
    context = click.Context(cli)
    for name in COMMANDS:
        assert f"simexplain {name} " in page
        for option in cli.get_command(context, name).params:
            if isinstance(option, click.Option):
                assert option.opts[0] in page, f"{name} {option.opts[0]}"
    assert "Sentinel" not in page


def test_examples_of_commands_are_printed_line_by_line(site: Path) -> None:
    page = (site / "commands.html").read_text(encoding="utf-8")
    printed = "\n".join(re.findall(r"<pre>.*?</pre>", page, re.S))
    lines = html.unescape(re.sub(r"<[^>]+>", "", printed)).splitlines()
    context = click.Context(cli)
    examples = [
        line.strip()
        for name in COMMANDS
        for line in cli.get_command(context, name).help.splitlines()
        if line.startswith("      simexplain ")
    ]
    assert len(examples) > 20
    assert not [example for example in examples if example not in lines]


def test_every_option_of_training_is_listed_as_it_is_declared(site: Path) -> None:
    page = html.unescape((site / "api" / "training.html").read_text(encoding="utf-8"))
    rows = [re.sub(r"<[^>]+>", "", row) for row in re.findall(r"<tr>.*?</tr>", page, re.S)]
    for name, (_, about) in declared(TrainOptions).items():
        (row,) = [row for row in rows if row.split()[:1] == [name]]
        assert about.help.rstrip(".") in row, name
        assert all(choice in row for choice in about.names), name
        assert about.unless is None or about.unless.where in row, name


def test_options_with_new_names_are_listed(site: Path) -> None:
    page = text_of(site / "commands.html")
    for old, new in RENAMED_OPTIONS.items():
        if old not in ("broken", "left_out"):
            assert f"--{old.replace('_', '-')}" in page, old
            for name in new:
                assert f"--{name.replace('_', '-')}" in page, name


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_search_works_on_pages_opened_as_files(site: Path) -> None:
    wanted = {
        "hugging face": "models.html", "clip": "models.html", "dino": "models.html",
        "which method": "which-method.html", "map is empty": "empty-maps.html",
        "completion": "commands.html", "upscale": "commands.html",
    }  # fmt: skip
    done = subprocess.run(
        ["node", Path(__file__).with_name("offline_search.js"), site, *wanted],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for words, page in wanted.items():
        assert any(index.partition("#")[0] == page for index in result[words]), words


def test_every_public_name_is_in_the_api_pages(site: Path) -> None:
    pages = "".join(p.read_text(encoding="utf-8") for p in (site / "api").glob("*.html"))
    for name in simexplain.__all__:
        anchors = re.findall(rf'id="simexplain(?:\.\w+)*?\.{name}"', pages)
        assert anchors, f"{name} is not in docs/api"


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        content = page.read_text(encoding="utf-8")
        loads = re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="((?:https?:)?//[^"]+)', content)  # fmt: skip  # noqa: E501
        assert not loads, f"{page.name} loads {loads}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?https?:", sheet.read_text("utf-8"))


def test_formulas_become_mathml_and_code_keeps_its_dollars(site: Path) -> None:
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    assert page.count("<math") > 30
    assert "\\prod" not in text_of(site / "mathematics.html")
    for path in site.rglob("*.html"):
        assert "simexplainformula" not in path.read_text(encoding="utf-8")


def test_hook_leaves_code_and_prices_alone() -> None:
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed")
    hooks: dict[str, object] = {}
    exec((ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"), hooks)
    page = type("Page", (), {"meta": {}})()
    source = "`$a$` costs $5 or $6\n\n```bash\necho $HOME $PATH$\n```\n\n$x_1$ and\n\n$$ y $$\n"
    taken = hooks["on_page_markdown"](source, page)
    for kept in ("`$a$`", "$5 or $6", "echo $HOME $PATH$"):
        assert kept in taken
    given = hooks["on_page_content"](taken, page)
    assert given.count("<math") == 2
    assert 'display="block"' in given
    assert "$x_1$" not in given


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one language that are not marked as not to be run."""
    result = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match["code"] for match in result if match["kind"] == kind and not match["skip"]]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one folder; hubs cannot be counted on, so weights are random.

    ``test_pages_typed.py`` runs the commands between them, too.
    """
    for name, role in (("a", "anchor"), ("b", "positive"), ("c", "negative")):
        shutil.copy(DEMO / f"{role}.jpg", tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    for page, folder in zip(TAUGHT, ("explanation", "reasons"), strict=True):
        codes = blocks(page, "python")
        assert len(codes) >= 3
        namespace: dict[str, object] = {"__name__": "documentation"}
        for code in codes:
            offline = code.replace("pretrained=True", "pretrained=False")
            offline = offline.replace('weights="DEFAULT"', "weights=None")
            exec(compile(offline, str(page), "exec"), namespace)
        assert (tmp_path / folder / "explanation.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", TRAINING, ids=lambda page: page.name)
def test_training_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of one's own, in order, in one namespace; what they trained can be loaded."""
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "documentation"}
    codes = blocks(page, "python")
    assert len(codes) == 2
    for code in codes:
        exec(
            compile(code.replace("pretrained=True", "pretrained=False"), str(page), "exec"),
            namespace,
        )
    (written,) = tmp_path.glob("*.pt")
    assert simexplain.load_model(written).default_layer
    assert all(0 < float(loss) < 1000 for loss in namespace["found"].parts.values())


@pytest.mark.parametrize(
    "page", [*TAUGHT, *TRAINING, ROOT / "docs" / "index.md"], ids=lambda page: page.name
)
def test_command_lines_are_understood(page: Path) -> None:
    """Every option and choice that a page names exists; nothing is run."""
    lines = [line for code in blocks(page, "bash") for line in code.splitlines()]
    shown = [shlex.split(line)[1:] for line in lines if line.startswith("simexplain ")]
    assert len(shown) >= 3
    context = click.Context(cli)
    for name, *arguments in shown:
        with suppress(click.exceptions.Exit):  # options that list something and end
            cli.get_command(context, name).make_context(name, list(arguments))


def test_pictures_of_the_pages_are_there_and_small() -> None:
    folder = ROOT / "docs" / "pictures"
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        Path(name).name
        for page in pages
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.(?:png|jpg))\)", page.read_text("utf-8"))
    }
    pictures = [path for path in folder.iterdir() if path.suffix != ".md"]
    assert named == {path.name for path in pictures}
    assert sum(path.stat().st_size for path in pictures) < 3.5e6

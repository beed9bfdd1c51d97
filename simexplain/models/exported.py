"""``torch.export`` programs (.pt2): vetted before loading, unflattened so layers can be tapped."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simexplain.data.preprocessing import IMAGENET
from simexplain.errors import ModelError, first_line
from simexplain.models.base import SimilarityModel
from simexplain.models.embedder import as_similarity_model

# The loader of torch looks names up and evaluates expressions from the file, so everything that
# is not on these lists is refused: a program needs no more than tensors and operators.
_ENTRY = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/\w+|models/\w+\.json|extra/.*"
    r"|data/(weights|constants)/((weight|tensor)_\d+|\w+_config\.json)|data/sample_inputs/\w+\.pt)"
)
_TARGET = re.compile(
    r"(torch\.ops\.aten\.(?!from_file)\w+(\.\w+)?"
    r"|torch\.ops\.(prims|torchvision|quantized_decomposed)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_\w+|torch\._C\._set_grad_enabled)"
)
# Names and other strings may end up in Python source that torch writes and runs.
_TEXT = re.compile(r"[\w.,:+\-> ]*")
_NAME = re.compile(r"[\w.]*")
_SPECIAL = ("metadata", "in_spec", "out_spec", "expr_str", "guards_code", "target", "as_operator")
_CALLS = {
    "Symbol", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Integer", "Identity", "Where",
    "ToFloat", "TruncToInt", "size",
}  # fmt: skip
_SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Subscript,
    ast.Attribute,
)  # fmt: skip


def load_exported(path: Path, *, trust: bool, distance: str) -> SimilarityModel:
    """Loads a program of ``torch.export.save``; a fixed batch or image size in it is obeyed.

    Args:
        path: The .pt2 file.
        trust: Load it even if it holds more than tensors and known operators.
        distance: As for ``as_similarity_model``.

    Raises:
        ModelError: If it is damaged, could run code, or does not take one batch of images.
    """
    # Read once: what is vetted is what is loaded.
    content = path.read_bytes()
    if not trust:
        _vet(path, content)
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    try:
        logger.disabled = True  # it would print a traceback before our one line
        program = torch.export.load(io.BytesIO(content))
        network = torch.export.unflatten(program)
    except Exception as error:  # torch raises anything from KeyError to its own classes here
        raise ModelError(
            f"'{path}' cannot be loaded as an exported program ({first_line(error)}); "
            f"export it again with torch {torch.__version__.split('+')[0]}."
        ) from error
    finally:
        logger.disabled = before
    batch, channels, size = _input_shape(program, path)
    preprocess = replace(IMAGENET, size=size, notes=_notes(program, path)).for_channels(channels)
    return as_similarity_model(
        ExportedNetwork(network),
        preprocess=preprocess,
        name=path.stem,
        distance=distance,
        batch_size=batch,
    )


class ExportedNetwork(nn.Module):
    """An unflattened program, called with the images alone; layers keep their own names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        # Not a submodule: its children are listed above, under the names the user knows.
        object.__setattr__(self, "_program", network)

    def forward(self, images: torch.Tensor) -> Any:
        """Whatever the program returns for images ``(M,3,H,W)``."""
        return self._program(images)  # type: ignore[operator]


def _input_shape(program: Any, path: Path) -> tuple[int | None, int, tuple[int, int]]:
    """The fixed batch size (None where dynamic), channels and image size of the only input."""
    names = program.graph_signature.user_inputs
    shapes = [n.meta["val"].shape for n in program.graph.nodes if n.name in names]
    images = [shape for shape in shapes if len(shape) == 4 and isinstance(shape[1], int)]
    # Three or fewer columns are rather the colours of a program with channels last.
    if len(shapes) != 1 or not images or (isinstance(images[0][3], int) and images[0][3] <= 3):
        raise ModelError(
            f"Expected '{path}' to take one batch of images (M,C,H,W), but it takes "
            f"{', '.join(str(tuple(shape)) for shape in shapes) or 'nothing'}."
        )
    batch, channels, height, width = shapes[0]
    sides = [side if isinstance(side, int) else 224 for side in (height, width)]
    return (batch if isinstance(batch, int) else None), channels, (sides[0], sides[1])


def _notes(program: Any, path: Path) -> tuple[str, ...]:
    """What is assumed of the program or odd about it."""
    notes = [
        f"'{path}' does not say how pictures are prepared; the values usual for ImageNet are used."
    ]
    modes = {
        bool(node.args[5])
        for node in program.graph.nodes
        if str(node.target) == "aten.batch_norm.default" and len(node.args) > 5
    }
    if True in modes:
        notes.append(
            f"'{path}' was exported in training mode, so its results depend on the whole batch; "
            "export it again after .eval()."
        )
    return tuple(notes)


def _vet(path: Path, content: bytes) -> None:
    """Refuses a program whose loading could run code."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.namelist()
            for entry in entries:
                inner = entry.partition("/")[2]
                if not _ENTRY.fullmatch(inner):
                    raise _refusal(path, f"the entry {inner}")
                if entries.count(entry) > 1:
                    raise _refusal(path, f"the entry {inner} twice")
                if inner.endswith(".json"):
                    _vet_json(path, json.loads(archive.read(entry)))
                elif inner.startswith("data/sample_inputs/"):
                    torch.load(io.BytesIO(archive.read(entry)), weights_only=True)
    except ModelError:
        raise
    except Exception as error:
        raise _refusal(path, f"something unreadable ({first_line(error)})") from error


def _vet_json(path: Path, content: Any) -> None:
    for key, value in _pairs(content):
        if key == "use_pickle" and value:
            raise _refusal(path, "pickled tensors")
        if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
            raise _refusal(path, f"the object {value}")
        if key in ("target", "as_operator") and isinstance(value, str) and not _is_operator(value):
            raise _refusal(path, f"the operator {value}")
        if key in ("in_spec", "out_spec") and "__" in str(value):
            raise _refusal(path, "containers of its own")
        if not _NAME.fullmatch(key) or not _is_plain(key, value):
            raise _refusal(path, f"odd text under {key}")
        if key == "expr_str" and not _is_expression(str(value)):
            raise _refusal(path, f"the expression {value}")
        if key == "guards_code" and not all(_is_expression(str(code)) for code in value or []):
            raise _refusal(path, "guards of its own")


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            if key != "metadata":  # where a node came from: kept as text, never looked up
                yield from _pairs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _pairs(value)


def _is_plain(key: str, value: Any) -> bool:
    """Whether a value is no string, or one in which no code can hide."""
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    named = key == "as_name" or key.endswith(("name", "names"))
    return key in _SPECIAL or all((_NAME if named else _TEXT).fullmatch(text) for text in texts)


def _is_operator(target: str) -> bool:
    return bool(_TARGET.fullmatch(target)) and "__" not in target


def _is_expression(code: str) -> bool:
    """Arithmetic on symbols and sizes, nothing that could reach an object's internals."""
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SYNTAX):
            return False
        if isinstance(node, ast.Attribute) and node.attr != "size":
            return False
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else called
            if name not in _CALLS:
                return False
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
        text = node.value if isinstance(node, ast.Constant) else 0
        if isinstance(text, str) and (not re.fullmatch(r"\w+", text) or "__" in text):
            return False
    return True


def _refusal(path: Path, what: str) -> ModelError:
    return ModelError(
        f"'{path}' holds {what}, and loading it could run code; export the network again, or pass "
        "--trust-pickle (trust_pickle=True) if you trust where the file comes from."
    )

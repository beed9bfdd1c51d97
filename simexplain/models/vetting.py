"""An exported program (.pt2) read with suspicion and written anew from what was understood.

``torch.export.load`` imports modules, walks attributes, evaluates text and unpickles, all under the
control of the file. So it never sees a file of unknown origin: it gets an archive that holds the
tensors and a description rebuilt by :mod:`simexplain.models.program_grammar`, and nothing else.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simexplain.errors import ModelError, first_line
from simexplain.models.program_grammar import (
    Rule,
    UnvettedError,
    boolean,
    integer,
    mapping,
    module_path,
    program,
    read_json,
    record,
    shown,
    tensor_description,
    text,
    union,
)

_MOST_ENTRIES, _LONGEST_JSON = 200_000, 256 * 2**20
_ROOT = re.compile(r"[\w.\- ()+@,=\[\]~#%&!']{1,255}")
_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|version|models/model\.json"
    r"|\.(data/\w+|format_version|storage_alignment)|extra/[\w.\- /]{1,255}"
    r"|data/weights/(weight_\d{1,6}|model_weights_config\.json)"
    r"|data/constants/(tensor_\d{1,6}|model_constants_config\.json)|data/sample_inputs/model\.pt",
    re.ASCII,
)
# How torch up to 2.7 laid a program out.
_OLD = re.compile(
    r"version|serialized_exported_program\.json|extra_files/[\w.\- /]{1,255}"
    r"|serialized_(state_dict|constants|example_inputs)\.pt",
    re.ASCII,
)
# Bytes per element by number of ScalarType in torch/_export/serde/schema.py.
_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2} | {
    28: 2, 29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8,
}  # fmt: skip
_EXPANDED = 2**24  # elements that a tensor may have beyond those that are stored


def vetted(path: Path, content: bytes) -> io.BytesIO:
    """The program of a file as an archive that is safe to load.

    Args:
        path: Where the content comes from, for the error.
        content: The bytes of the file.

    Returns:
        A new archive for ``torch.export.load``.

    Raises:
        ModelError: If the file holds anything besides tensors and known operators.
    """
    try:
        return _rebuilt(content)
    except UnvettedError as error:
        raise _refusal(path, error.what, error.advice) from error
    except (
        zipfile.BadZipFile, NotImplementedError, RecursionError, RuntimeError, ValueError, EOFError,
        KeyError, TypeError, OSError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise _refusal(path, f"something unreadable ({first_line(error)})") from error


def refused_part(content: bytes) -> str | None:
    """What a readable program holds for which :func:`vetted` refuses it; None where it does not."""
    try:
        _rebuilt(content)
    except UnvettedError as error:
        return error.what
    return None


def _refusal(path: Path, what: str, advice: str = "export the network again") -> ModelError:
    return ModelError(
        f"'{path}' holds {what}, and loading it could run code; {advice}, or pass "
        "--trust-pickle (trust_pickle=True) if you trust where the file comes from."
    )


def _rebuilt(content: bytes) -> io.BytesIO:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = _entries(archive, len(content))
        if "serialized_exported_program.json" in entries:
            return _rebuilt_old(archive, entries)
        return _rebuilt_new(archive, entries)


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their name below the root folder; all stored, each once.

    Overlapping or compressed entries could swell to any size; two readers may disagree on which
    of two equal names counts.
    """
    infos = archive.infolist()
    if len(infos) > _MOST_ENTRIES:
        raise UnvettedError(f"{len(infos)} entries")
    old = any(info.filename == "serialized_exported_program.json" for info in infos)
    root = "" if old else (infos[0].filename.partition("/")[0] if infos else "")
    if not old and not (_ROOT.fullmatch(root) and root.strip(".")):
        raise UnvettedError(f"the folder {shown(root)}")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        first, _, inner = ("", "", info.filename) if old else info.filename.partition("/")
        good = (_OLD if old else _ENTRY).fullmatch(inner)
        if first != root or not good or ".." in inner or "//" in inner:
            raise UnvettedError(f"the entry {shown(inner or info.filename)}")
        if inner in entries:
            raise UnvettedError(f"the entry {inner} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnvettedError(f"the compressed or encrypted entry {inner}")
        entries[inner] = info
    if sum(info.file_size for info in infos) > size:
        raise UnvettedError("entries that are larger than the file")
    return entries


def _read(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    if name not in entries:
        raise UnvettedError(f"no entry {name}")
    return archive.read(entries[name])


def _json(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str, rule: Rule
) -> Any:
    if name in entries and entries[name].file_size > _LONGEST_JSON:
        raise UnvettedError(f"more than {_LONGEST_JSON >> 20} MiB in {name}")
    return rule(read_json(_read(archive, entries, name)))


_concrete = union("a size", as_int=integer(0))
_payload = record(
    "a table of tensors",
    config=mapping(
        module_path,
        record(
            "a tensor",
            path_name=text(re.compile(r"(weight|tensor)_\d{1,6}", re.ASCII), "the object"),
            is_param=boolean,
            use_pickle=lambda value: _unpickled(value),
            tensor_meta=tensor_description(_concrete),
        ),
    ),
)


def _unpickled(value: Any) -> bool:
    if value is not False:
        raise UnvettedError("pickled tensors")
    return False


def _rebuilt_new(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> io.BytesIO:
    for name, expected in (("archive_format", {b"pt2"}), ("byteorder", {b"little", b"big"})):
        if _read(archive, entries, name) not in expected:
            raise UnvettedError(f"an unknown {name}")
    _check_examples(_read(archive, entries, "data/sample_inputs/model.pt"))
    version = _read(archive, entries, "archive_version")
    if not re.fullmatch(rb"\d{1,4}", version):
        raise UnvettedError("an unknown archive_version")
    described = _json(archive, entries, "models/model.json", program)
    made = {
        ".data/version": b"6\n",  # of the container, which has not changed since there is a .pt2
        "archive_format": b"pt2",
        "archive_version": version,
        "byteorder": _read(archive, entries, "byteorder"),
        "models/model.json": json.dumps(described, allow_nan=False).encode(),
        # Examples are not needed.
        "data/sample_inputs/model.pt": b"",
    }
    for folder, prefix in (("weights", "weight"), ("constants", "tensor")):
        name = f"data/{folder}/model_{folder}_config.json"
        payload = _json(archive, entries, name, _payload)
        made[name] = json.dumps(payload).encode()
        for file in _checked_tensors(payload.get("config", {}), entries, f"data/{folder}/", prefix):
            made[file] = archive.read(entries[file])
    return _archive({f"program/{name}": value for name, value in made.items()})


def _checked_tensors(
    tensors: Mapping[str, Any],
    entries: Mapping[str, zipfile.ZipInfo],
    folder: str,
    prefix: str,
) -> list[str]:
    """The files of a table's tensors, each of which lies inside its file."""
    kinds: dict[str, tuple[int, Any]] = {}
    for own, payload in tensors.items():
        file, meta = f"{folder}{payload.get('path_name')}", payload.get("tensor_meta", {})
        if not str(payload.get("path_name")).startswith(prefix) or file not in entries:
            raise UnvettedError(f"the object {shown(payload.get('path_name'))}")
        kind = (meta.get("dtype"), meta.get("device"))
        width = _WIDTHS.get(meta.get("dtype", 0))
        if width is None or kinds.setdefault(file, kind) != kind or meta.get("layout") != 7:
            raise UnvettedError(f"the tensor {own} of an unknown kind")
        stored, rest = divmod(entries[file].file_size, width)
        sizes = [size["as_int"] for size in meta.get("sizes", [])]
        strides = [stride["as_int"] for stride in meta.get("strides", [])]
        count = last = 1
        for size, stride in zip(sizes, strides, strict=True):
            count, last = count * size, last + (size - 1) * stride
        last += meta.get("storage_offset", {"as_int": 0})["as_int"]
        if rest or (count and last > stored) or count > stored + _EXPANDED:
            raise UnvettedError(f"the tensor {own}, which is larger than its entry")
    return list(kinds)


def _check_examples(content: bytes) -> None:
    """Recognises a forged file; torch itself would go on to unpickle anything."""
    if content:
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises anything here
            raise UnvettedError("pickled objects among the examples") from error


def _rebuilt_old(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> io.BytesIO:
    """The layout of torch up to 2.7, whose tensors are pickled: read as tensors alone."""
    version = _read(archive, entries, "version")
    if not re.fullmatch(rb"\d{1,4}\.\d{1,4}", version):
        raise UnvettedError("an unknown version")
    _check_examples(_read(archive, entries, "serialized_example_inputs.pt"))
    name = "serialized_exported_program.json"
    described = _json(archive, entries, name, program)
    made = {
        "version": version,
        name: json.dumps(described, allow_nan=False).encode(),
        "serialized_example_inputs.pt": b"",
    }
    for each in ("state_dict", "constants"):
        file = f"serialized_{each}.pt"
        made[file] = _tensors(_read(archive, entries, file))
    return _archive(made)


def _tensors(content: bytes) -> bytes:
    """A table of plain tensors, unpickled with torch's own short list and pickled anew."""
    if not content:
        return b""
    try:
        table = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything here
        raise UnvettedError("pickled objects") from error
    plain = (Tensor, nn.Parameter)
    if not isinstance(table, dict) or any(type(value) not in plain for value in table.values()):
        raise UnvettedError("pickled objects")
    buffer = io.BytesIO()
    torch.save({module_path(key): value for key, value in table.items()}, buffer)
    return buffer.getvalue()


def _archive(entries: Mapping[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    buffer.seek(0)
    return buffer

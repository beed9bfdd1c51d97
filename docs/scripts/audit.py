"""Checks what `pip install '.[dev]'` brings: versions, files and known faults.

``python docs/scripts/audit.py`` says what is not pinned in ``constraints.txt``, which files differ
from those recorded in ``constraints-hashes.txt``, and which versions have published faults; it ends
with 1 if there is anything. With ``--write`` it records the files that the index offers now, beside
those of other platforms. Without a network it says what was skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PINS, HASHES = ROOT / "constraints.txt", ROOT / "constraints-hashes.txt"
OFFLINE = ("ConnectionError", "ProxyError", "ReadTimeout", "ConnectTimeout", "HTTPError: 4")
Pin = tuple[str, str]


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_of(text: str) -> dict[str, str]:
    """The version of each package, of lines ``name==version``.

    Raises:
        ValueError: If a line is anything else.
    """
    pins = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)(\s*;.*)?", line)
        if found is None:
            raise ValueError(f"Expected 'name==version' in {PINS.name}, got '{line}'.")
        pins[normal(found[1])] = found[2]
    return pins


def hashes_of(text: str) -> dict[Pin, set[str]]:
    """The SHA-256 of each file of a version, of lines ``name==version sha256:... sha256:...``."""
    known: dict[Pin, set[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pin, *found = line.split()
        name, _, version = pin.partition("==")
        known[(normal(name), version)] = {one.removeprefix("sha256:") for one in found}
    return known


def resolved(report: Mapping[str, Any]) -> dict[Pin, str]:
    """Every package of a report of pip but this one, with the SHA-256 of its file."""
    files = {}
    for item in report["install"]:
        name, version = normal(item["metadata"]["name"]), item["metadata"]["version"]
        if name != "simexplain":
            hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
            files[(name, version)] = hashes.get("sha256", "")
    return files


def faults(
    files: Mapping[Pin, str], pins: Mapping[str, str], known: Mapping[Pin, set[str]]
) -> Iterator[str]:
    """What is not as it is pinned and recorded, a sentence each."""
    for (name, version), digest in sorted(files.items()):
        if pins.get(name) != version:
            yield f"{name} {version} is not pinned in {PINS.name}."
        if not digest:
            yield f"The index gives no SHA-256 for the file of {name} {version}."
        elif (name, version) not in known:
            yield f"{name} {version} has no line in {HASHES.name}; check its file, then --write."
        elif digest not in known[(name, version)]:
            yield f"The file of {name} {version} is not one of those recorded: sha256:{digest}."


def merged(files: Mapping[Pin, str], known: Mapping[Pin, set[str]]) -> str:
    """The content of the list of hashes with these files; versions no longer used are left out."""
    lines = []
    for (name, version), digest in sorted(files.items()):
        every = sorted(known.get((name, version), set()) | ({digest} if digest else set()))
        lines.append(" ".join((f"{name}=={version}", *(f"sha256:{one}" for one in every))))
    return "\n".join(lines) + "\n"


def pip(
    *words: str | Path, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Runs pip and gives what it says."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


def reason_of(run: subprocess.CompletedProcess[str]) -> str:
    """The last line of an error, without addresses."""
    last = (run.stderr.strip() or run.stdout.strip() or "no reason").splitlines()[-1]
    return re.sub(r"\S+://\S+", "...", last)[:200]


def asked_index(folder: Path) -> dict[Pin, str] | None:
    """What an installation would bring; None where there is no index."""
    report = folder / "report.json"
    run = pip(
        "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report,
        "--constraint", PINS, f"{ROOT}[dev]",
    )  # fmt: skip
    if run.returncode == 0:
        return resolved(json.loads(report.read_text(encoding="utf-8")))
    if any(word in run.stderr for word in OFFLINE):
        print(f"Skipped the files: the index cannot be asked ({reason_of(run)}).")
        return None
    raise SystemExit(f"pip cannot resolve the project: {reason_of(run)}")


def advisories(folder: Path) -> list[str]:
    """Published faults of the pinned versions, by pip-audit in an environment of its own."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run = pip("install", "--quiet", "pip-audit", python=python)
    if run.returncode:
        print(f"Skipped the advisories: pip-audit cannot be installed ({reason_of(run)}).")
        return []
    words = ["--requirement", str(PINS), "--no-deps", "--disable-pip", "--format", "json"]
    audit = subprocess.run(
        [str(python), "-m", "pip_audit", *words], capture_output=True, text=True, cwd=ROOT
    )
    try:
        found = json.loads(audit.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"Skipped the advisories: their source cannot be asked ({reason_of(audit)}).")
        return []
    lines, text = judged(found)
    print(text)
    return lines


def judged(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Published faults of what was looked up, a sentence each, and how much of it is known."""
    unknown = [f"{one['name']} {one['version']}" for one in found if "skip_reason" in one]
    known = [one for one in found if "skip_reason" not in one]
    lines = [
        f"{one['name']} {one['version']}: {fault['id']}, mended in "
        f"{', '.join(fault['fix_versions']) or 'no version'}."
        for one in known
        for fault in one["vulns"]
    ]
    if not known:
        return lines, f"Skipped the advisories: their source knows none of {len(found)} versions."
    rest = f"; their source does not know {', '.join(unknown)}" if unknown else ""
    return lines, f"{len(known)} versions were looked up among the advisories{rest}."


def main(*words: str) -> int:
    """Prints what was found; 1 if anything is wrong."""
    pins = pins_of(PINS.read_text(encoding="utf-8"))
    known = hashes_of(HASHES.read_text(encoding="utf-8")) if HASHES.is_file() else {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        files = asked_index(Path(folder))
        if files is not None and "--write" in words:
            HASHES.write_text(merged(files, known), encoding="utf-8")
            known = hashes_of(HASHES.read_text(encoding="utf-8"))
        if files is not None:
            wrong += faults(files, pins, known)
            print(f"{len(files)} packages compared with {PINS.name} and {HASHES.name}.")
        wrong += advisories(Path(folder))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

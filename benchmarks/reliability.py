"""What was tried against simexplain, how often, and what happened: docs/reliability.md.

``python tests/hostile/record.py NAME --keep`` measures a line of it; ``python benchmarks/pages.py
reliability`` writes the page.
"""

from __future__ import annotations

from typing import Any

from store import header, line

TRIED = {
    "pictures": (
        "Files in the place of a picture",
        "Pictures cut at every tenth, with flipped bytes, of zero bytes, with a wrong ending, "
        "bombs, CMYK, 16 bits, floats, palettes, animations, EXIF orientations 1 to 8, one pixel "
        "wide, pipes, devices and folders, names with quotes, markup, escapes, 250 characters and "
        "bytes that are not UTF-8: each through every command, in every place that takes a "
        "picture. Readable ones must be explained.",
    ),
    "models": (
        "Files in the place of a model",
        "Cut, changed, forged and foreign files of every format that is read, and archives that "
        "would run code: each through every command, in every place that takes a model. Every "
        "connection is blocked; a file that code would leave behind is looked for.",
    ),
    "fuzz": (
        "Forged programs",
        "The JSON of an exported program (`.pt2`), and the JSON in its texts, changed at random by "
        "hypothesis. Imports, files that are opened and code that is compiled are watched by an "
        "audit hook; the test fails at the first that does more than load plain tensors.",
    ),
    "kills": (
        "Killed",
        "Every command that writes, with and without a result that is already there, killed "
        "before every step that changes a file, and ten times by chance. What is there afterwards "
        "must be the old result, the new one, none, or be refused with what to do; the same "
        "command once more must end as an undisturbed run does.",
    ),
    "races": (
        "Two at once",
        "Every pair of commands that write, started together into one place, with and without "
        "`--force`. No file may mix two runs, and without `--force` only one may succeed.",
    ),
    "limits": (
        "Large pictures",
        "Pictures of 100 megapixels; the peak of resident memory of the whole process, with "
        "PyTorch's own share of about half a gigabyte.",
    ),
    "threads": (
        "Many threads, many times",
        "One model explained in eight threads at once, in eval and in training mode, beside a pass "
        "of its owner's; 1,000 explanations by one process, which may leave 8 MiB in use.",
    ),
}
"""The sections of the page: a title, and what is done."""

CHECKED = (
    "For every run of the first two tables it is checked that the command ends within 20 seconds, "
    "that it ends with success or with one sentence, that no traceback and no warning of a library "
    "is shown, that no connection is opened, that nothing of the file's was run, and that a "
    "refused command leaves no file behind, finished or not."
)
NUMBERS = (
    "The largest difference of a map from a plain call, as a share of the largest value of a "
    "comparison's maps, when nothing but the arithmetic changes: three triplets, a small residual "
    "network (a small ViT for the methods that read attention), random weights. 0 means equal "
    "bytes."
)


def page(record: dict[str, Any]) -> str:
    """The page, from what the campaigns kept."""
    lines = [
        "# Reliability",
        "",
        "What was tried to make simexplain crash, hang, lose files, run code or give a wrong "
        "number, how often, and what happened. Each line is what the command beneath it printed; "
        "run it to see the same on your machine. [Security](security.md) says what is promised.",
        "",
        CHECKED,
        "",
    ]
    for name, (title, text) in TRIED.items():
        if name in record:
            lines += [f"## {title}", "", text, "", f"**{_sentence(record[name])}**", ""]
            lines += _faults(record[name])
            lines += [
                "```bash",
                f"python tests/hostile/record.py {record[name]['with']}",
                "```",
                "",
            ]
    lines += ["## Numbers", "", NUMBERS, "", record["numbers"]["found"], ""]
    lines += ["```bash", "python tests/hostile/record.py numbers", "```", ""]
    if "portable" in record:
        lines += ["The tests of numbers, as on other processors ([Numbers](numbers.md)):", ""]
        lines += [*header(["setting", "environment", "tests"])]
        lines += [line(row) for row in record["portable"]["rows"]]
        lines += ["", "```bash", "make test-portable", "```", ""]
    return "\n".join(lines)


def _sentence(kept: dict[str, Any]) -> str:
    """What was found, as a sentence."""
    found: str = kept["found"]
    return f"{found[0].upper()}{found[1:]}."


def _faults(kept: dict[str, Any]) -> list[str]:
    """The faults that were seen, one to a line; nothing is released before they are mended."""
    if not kept["faults"]:
        return []
    return ["Found, and mended since:", "", *(f"- `{fault}`" for fault in kept["faults"]), ""]

"""The page of ``fit.py``, from its record."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

FITS = ("crop", "squash", "whole", "pad")
_SETS = (
    "photographs on white",
    "photographs anywhere",
    "photographs in the middle",
    "emoji anywhere",
)

HEAD = """# Wide and tall pictures

Which fit shows a network most of use in a picture that is wide or tall? `crop` is the model's own
preprocessing; `squash` is `--fit squash`, which keeps the share of the picture that the crop keeps
of a square one; `whole` squashes all of it, as [Segment](../segmentation.md) does; `pad` is
`--fit pad`. Written by

    python benchmarks/fit.py --stamps FOLDER --emoji FOLDER --mobilenet FILE \\
        --record benchmarks/records/fit.json --out docs/benchmarks/fit.md

in one thread; `fit.json` has every figure.

**What follows.** No fit is best everywhere, so the default stays the model's own. Where the object
fills the picture or lies anywhere in it, `crop` has a lower MAP@R than `squash` and `whole`, on
both networks; where it lies in the middle, `crop` is best by a tenth, because it shows it larger.
`pad` is best on pictures that the object fills, and worst on some others. For a search over
pictures whose subject may be anywhere, `--fit squash` is the better choice, for one over pictures
that fill their frame `--fit pad`; where subjects are in the middle with a margin, keep `crop`.
Index and search need the same fit. As to pointing, what is cut off cannot be found, but 48 scenes
do not tell the fits apart for certain.
"""


def page(record: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    return "\n".join([HEAD, *_retrieval(record), *_pointing(record)]) + "\n"


def _retrieval(record: dict[str, Any]) -> list[str]:
    """Recall@1 and MAP@R by network, set and fit."""
    lines = [
        "## Retrieval",
        "",
        "Recall@1 / MAP@R in %, every picture a query and all others its gallery; means over the "
        "seeds, with the standard error of Recall@1 over them. *On white*: cut-out photographs in "
        "their own aspect, up to 3.3 : 1, half above 1.33 : 1. *Anywhere*, *in the middle*: "
        "the same, and emoji, on grounds of 1.4 : 1 to 2.4 : 1, wide and tall, the longer side of "
        "the object three quarters of the short side.",
        "",
        "| network | pictures | " + " | ".join(FITS) + " |",
        "|" + " --- |" * (2 + len(FITS)),
    ]
    for network, own in record.items():
        result: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for key, values in own["retrieval"].items():
            name, fit = key.rsplit(", ", 1)
            result[name.rsplit(", ", 1)[0], fit].append(values)
        for name in _SETS:
            cells = [_cell(100 * np.array(result[name, fit])) for fit in FITS]
            lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(values: np.ndarray) -> str:
    recall, precision = values.mean(axis=0)
    if len(values) < 2:
        return f"{recall:.1f} / {precision:.1f}"
    error = values[:, 0].std(ddof=1) / len(values) ** 0.5
    return f"{recall:.1f} ± {error:.1f} / {precision:.1f}"


def _pointing(record: dict[str, Any]) -> list[str]:
    """Hit, distractor hit and energy by network, method and fit."""
    views = np.concatenate(list(next(iter(record.values()))["in view"].values()))
    lines = [
        "## Pointing",
        "",
        "Hit / distractor hit / energy inside, with the standard error of the hits, over "
        f"{len(views)} wide and tall scenes of two objects; the query shows another of the kind of "
        "one of them. "
        f"The crop shows nine tenths of that one in {(views > 0.9).mean():.0%} of the scenes, "
        f"less than a tenth in {(views < 0.1).mean():.0%}.",
        "",
        "| network | method | " + " | ".join(FITS) + " |",
        "|" + " --- |" * (2 + len(FITS)),
    ]
    for network, own in record.items():
        seeds = list(own["in view"])
        for method in next(iter(own["pointing"].values())):
            cells = []
            for fit in FITS:
                parts = [own["pointing"][f"{seed}, {fit}"][method] for seed in seeds]
                scores = np.concatenate([np.array(part) for part in parts])
                hit, other, energy = scores.mean(axis=0)
                error = scores[:, 0].std(ddof=1) / len(scores) ** 0.5
                cells.append(f"{hit:.2f} ± {error:.2f} / {other:.2f} / {energy:.2f}")
            lines.append(f"| {network} | `{method}` | {' | '.join(cells)} |")
    return lines

"""Makes the pictures of ``docs/attribute.md`` from the bundled demo triplet.

AVSL has to be fitted to pictures first, and three are too few to say anything about nodes. So give
a folder of pictures, each class in a sub-folder. The report and the caption, which names what the
model was fitted to, are written beside the pictures, and the page includes both::

    python docs/scripts/make_attribution.py FOLDER --what "pictures of birds"
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from make_pictures import DEMO, MODEL, TARGET, TRIPLET, write
from simexplain_cli.attribute import report

from simexplain import attribute, fit, load_model
from simexplain.models.avsl import AVSL

LISTED = 5


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="pictures, each class in a sub-folder")
    parser.add_argument("--what", default="pictures", help="what they show, for the caption")
    parser.add_argument("--unlabelled", action="store_true", help="without classes")
    parser.add_argument("--nodes", type=int, default=512, help="of each level")
    parser.add_argument("--model", type=Path, help="already fitted to the folder: saves the time")
    return parser.parse_args()


def fitted(given: argparse.Namespace) -> AVSL:
    """The model of the pictures."""
    if given.model is None:
        network = load_model(MODEL)
        return fit(network, given.folder, labelled=not given.unlabelled, nodes=given.nodes)
    model = load_model(given.model.resolve())
    if not isinstance(model, AVSL):
        sys.exit(f"Expected an AVSL model, got {model.name}.")
    return model


def caption(model: AVSL, what: str) -> str:
    """What the model was fitted to."""
    report = model.report
    classes = f" in {report['classes']} classes" if "classes" in report else ""
    return (
        f"AVSL over `{MODEL}`, {model.origin}, up to {max(model.widths)} nodes a level. Fitted to "
        f"{report['images']} {what}{classes}, which are not part of the project."
    )


def main() -> None:
    """Writes both figures, what the command line prints, and the caption."""
    given = arguments()
    model = fitted(given)
    os.chdir(DEMO)  # so that the report names files as a user would
    anchor, *others = (path.name for path in TRIPLET)
    result = attribute(model, anchor, others)
    printed = io.StringIO()
    with redirect_stdout(printed):
        report(result, LISTED, [])
    write(result.figure(), "attribution")
    write(result.ranking(), "attribution_ranking")
    text = printed.getvalue().rstrip()
    # The reader should not see the file's name.
    text = text.replace(model.name, f"{MODEL} AVSL")
    snippets = {"report": f"```text\n{text}\n```", "caption": caption(model, given.what)}
    for name, content in snippets.items():
        (TARGET / f"attribution_{name}.md").write_text(content + "\n", encoding="utf-8")
        print(content)
    for path in sorted(TARGET.glob("attribution*.png")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

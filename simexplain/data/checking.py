"""Whether a data set can be trained on: all that is wrong, before anything is computed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from simexplain.arguments import typed
from simexplain.data.dataset_split import DataSplit, everything, few, relative
from simexplain.data.folders import Progress, Record, mask_of
from simexplain.data.images import check_scans, opened_picture, pillow_quiet, read_picture
from simexplain.data.preprocessing import Preprocess
from simexplain.data.training_set import Augmentation
from simexplain.errors import ImageError

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_EIGHTH = 8


@typed
def check_training(
    split: DataSplit,
    *,
    classes: int,
    each: int,
    deep: bool = True,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Finds all that would spoil a training run or its evaluation.

    Args:
        split: The data set; read it with ``strict=False`` to have its own problems reported here
            too.
        classes: Different classes in a batch.
        each: Pictures of each. Where it is 1 a class may have a single picture.
        deep: Open every picture and mask; else only look whether the files are there.
        progress: Called with the number of pictures looked at and of all.

    Returns:
        What is odd, but can be trained on; a sentence each.

    Raises:
        ImageError: If anything is wrong: everything, in one line.
    """
    problems = [*split.problems, *_unfit_classes(split, classes, each)]
    odd = _odd_classes(split, each)
    shared = {r.path.resolve() for r in split.train} & {
        r.path.resolve() for r in (*split.queries, *(split.gallery or ()))
    }
    names = [relative(path, split.root.resolve()) for path in sorted(shared)]
    problems += _listing(names, "picture", "both to train on and to test")
    looks = _looks(everything(split), deep, progress)
    problems += _broken(split, looks)
    odd += _odd_files(split, looks)
    if problems:
        raise ImageError(
            f"'{split.name}' cannot be trained on, {_count(len(problems), 'problem')}: "
            f"{'; '.join(problems)}; mend this in the data or choose another batch."
        )
    return tuple(f"{line}." for line in odd)


def check_views(
    split: DataSplit, preprocess: Preprocess, augmentation: Augmentation | None = None
) -> None:
    """Finds pictures that can be read, but of which the network's preprocessing shows nothing.

    Args:
        split: A data set that :func:`check_training` has passed; only sizes are read again.
        preprocess: As the network expects; pictures to search with and in all go through it.
        augmentation: Those to train on, too, only where it leaves them as they are (None).

    Raises:
        ImageError: If there is one: all of them, in one line.
    """
    records = [*split.queries, *(split.gallery or ())]
    if augmentation is None or augmentation.resize is None:
        records = [*split.train, *records]

    def why(path: Path) -> str:
        with opened_picture(path) as opened:
            try:
                preprocess.geometry((opened.height, opened.width))
            except ImageError:
                return f"{relative(path, split.root)} of {opened.width}x{opened.height}"
        return ""

    paths = list(dict.fromkeys(record.path for record in records))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        narrow = [text for text in pool.map(why, paths) if text]
    if lines := _listing(narrow, "picture", "too elongated for the network's view", quote=""):
        raise ImageError(f"'{split.name}' cannot be trained on, {lines[0]}; crop or remove them.")


def _unfit_classes(split: DataSplit, classes: int, each: int) -> list[str]:
    sizes = Counter(record.label for record in split.train)
    unlabelled = [relative(r.path, split.root) for r in split.train if r.label is None]
    singles = sorted(label for label, size in sizes.items() if label is not None and size == 1)
    least, have = max(2, classes), len(split.classes)
    few_classes = f"{_count(have, 'class')} to train on where a batch needs {least}"
    alone = "to train on with a single picture, which has no positive"
    return [
        *_listing(split.empty, "class folder", "without a picture"),
        *([f"no class for {few(unlabelled)}"] if unlabelled else []),
        *_listing(singles if each > 1 else (), "class", alone),
        *([few_classes] if have < least else []),
    ]


def _odd_classes(split: DataSplit, each: int) -> list[str]:
    sizes = Counter(record.label for record in split.train if record.label is not None)
    small = sorted(label for label, size in sizes.items() if 1 < size < each)
    repeated = f"with fewer than {each} pictures, which are repeated in a batch"
    both = sorted(set(split.classes) & {r.label for r in split.queries if r.label is not None})
    seen = "both to train on and to test, so that the test is not zero-shot"
    none = [] if split.queries else ["No test pictures were given, so nothing can be evaluated"]
    counts = Counter(r.label for r in (split.queries if split.gallery is None else split.gallery))
    least = 2 if split.gallery is None else 1
    lost = [relative(r.path, split.root) for r in split.queries if counts[r.label] < least]
    return [
        *_listing(small, "class", repeated),
        *_listing(both, "class", seen),
        *none,
        *_listing(lost, "test picture", "without another of the class to be found"),
    ]


@dataclass(frozen=True)
class _Look:
    """What opening a picture showed."""

    wrong: str = ""
    mask_wrong: str = ""
    unmasked: bool = False
    digest: bytes = b""


def _looks(records: Iterable[Record], deep: bool, progress: Progress | None) -> dict[Path, _Look]:
    """Each file once, several at a time: Pillow decodes outside of Python's lock."""
    once = {record.path: record for record in records}
    known: dict[Path, _Look] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = pool.map(_deep if deep else _shallow, once.values())
        for path, look in zip(once, looks, strict=True):
            known[path] = look
            if progress is not None:
                progress(len(known), len(once))
    return known


def _shallow(record: Record) -> _Look:
    wrong = "" if record.path.is_file() else "is not there"
    missing = record.mask is not None and not record.mask.is_file()
    return _Look(wrong, "is not there" if missing else "", record.mask is None)


def _deep(record: Record) -> _Look:
    if not record.path.is_file():
        return _shallow(record)
    try:
        content = record.path.read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        size = _decoded(record.path, content)
    except ImageError as error:
        return _Look(_reason(error, record.path))
    except OSError as error:
        return _Look(f"cannot be read ({error.strerror or error})")
    if record.mask is not None and not record.mask.is_file():
        return _Look("", "is not there", digest=digest)
    try:
        return _Look(unmasked=mask_of(record, size) is None, digest=digest)
    except ImageError as error:
        return _Look("", _reason(error, record.mask), digest=digest)


def _decoded(path: Path, content: bytes) -> tuple[int, int]:
    """Height and width of a picture that can be read to its end.

    Raises:
        ImageError: If it cannot.
    """
    try:
        # Warnings of damaged metadata, which read_picture forgives.
        with pillow_quiet(), Image.open(BytesIO(content)) as opened:
            if opened.format == "JPEG":
                check_scans(str(path), content)
                height, width = opened.height, opened.width
                turned = opened.getexif().get(_ORIENTATION) in _TURNED
                # Every byte is read all the same, but an eighth of the pixels computed.
                opened.draft("RGB", (width // _EIGHTH, height // _EIGHTH))
                opened.load()
                return (width, height) if turned else (height, width)
    except Exception:  # read_picture reports whatever it is
        pass
    image = read_picture(path).image
    return image.height, image.width


def _reason(error: ImageError, path: Path | None) -> str:
    """The reason in an error about a file, without the file's name and the advice."""
    text = str(error).replace(f"'{path}' ", "", 1)
    if "size of its picture" in text:
        return text.partition(" picture, ")[2].rstrip(".").replace(", got", " expected,")
    return text.partition(";")[0].rstrip(".")


def _broken(split: DataSplit, looks: dict[Path, _Look]) -> list[str]:
    named = [(relative(path, split.root), look) for path, look in looks.items()]
    wrong = [f"{name} {look.wrong}" for name, look in named if look.wrong]
    masks = [f"{name}: {look.mask_wrong}" for name, look in named if look.mask_wrong]
    return [
        *_listing(wrong, "picture", "that cannot be read", quote=""),
        *_listing(masks, "picture", "whose mask does not fit", quote=""),
    ]


def _odd_files(split: DataSplit, looks: dict[Path, _Look]) -> list[str]:
    bare = [relative(r.path, split.root) for r in split.train if looks[r.path].unmasked]
    unmasked = f"{len(bare)} of {_count(len(split.train), 'picture')} have no mask: {few(bare)}"
    trained = {looks[r.path].digest for r in split.train} - {b""}
    own = {record.path for record in split.train}
    tested = {r.path for r in (*split.queries, *(split.gallery or ()))} - own
    copies = sorted(relative(p, split.root) for p in tested if looks[p].digest in trained)
    return [
        *([unmasked] if bare and any(record.mask for record in split.train) else []),
        *_listing(copies, "test picture", "with the same content as one to train on"),
    ]


def _listing(names: Sequence[object], what: str, text: str, *, quote: str = "'") -> list[str]:
    """How many there are and the first of them, in a line; nothing without any."""
    return [f"{_count(len(names), what)} {text}: {few(names, quote)}"] if names else []


def _count(number: int, one: str) -> str:
    many = f"{one}es" if one.endswith("s") else f"{one}s"
    return f"{number} {one if number == 1 else many}"

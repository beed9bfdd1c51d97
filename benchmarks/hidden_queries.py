"""How retrieval fares when a part of each query is hidden: by chance, or what the network attends.

    python benchmarks/hidden_queries.py FOLDER --model 'no mining=RUN/model.pt' \
        --model '+ SAM=RUN/model.pt' --out FILE

FOLDER is that of ``training_results.py``, and retrieval is measured as there; only queries lose
something, the gallery stays whole. Hidden pixels take the data set's mean colour, as in mining.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from held_out import held_out
from store import publish
from torch import Tensor

from simexplain import Comparison, explain, load_model
from simexplain.data.folders import Batches
from simexplain.evaluation.retrieval import Embedded, ranked_retrieval
from simexplain.models.base import SimilarityModel

CHUNK = 32


def boxes(count: int, size: tuple[int, int], share: float, seed: int) -> Tensor:
    """A rectangle of a share of the area somewhere in each picture ``(M,H,W)``, true inside."""
    random = torch.Generator().manual_seed(seed)
    height, width = (round(side * share**0.5) for side in size)
    result = torch.zeros(count, *size, dtype=torch.bool)
    for own in result:
        top = int(torch.randint(size[0] - height + 1, (), generator=random))
        left = int(torch.randint(size[1] - width + 1, (), generator=random))
        own[top : top + height, left : left + width] = True
    return result


def attended(model: SimilarityModel, images: Tensor, share: float) -> Tensor:
    """The share of each picture that makes it what it is to the network ``(M,H,W)``.

    These are the highest pixels of the map of a picture's similarity to itself.
    """
    requested = [Comparison.pair(chunk, chunk) for chunk in images.split(CHUNK)]
    maps = torch.cat(
        [explain(model, pair, "similarity_cam", check=False).heatmaps[:, 0] for pair in requested]
    )
    flat = maps.flatten(1)
    highest = flat.topk(round(share * flat.shape[1])).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, highest, True).view_as(maps)


def rows_of(model: SimilarityModel, images: Tensor) -> Tensor:
    """Embeddings ``(M,E)``."""
    return torch.cat([model.embed(chunk) for chunk in images.split(CHUNK)])


@torch.no_grad()
def measure(
    model: SimilarityModel, folder: Path, share: float, seeds: list[int]
) -> dict[str, tuple[float, float]]:
    """Recall@1 and MAP@R of whole queries, with boxes hidden, and with attention hidden."""
    records = held_out(folder)
    batches = Batches(records, model.preprocess, CHUNK)
    places, parts = zip(*batches, strict=True)
    images, known = torch.cat(parts), tuple(records[n] for part in places for n in part)
    whole = Embedded(rows_of(model, images), known, batches.broken)
    size = int(images.shape[2]), int(images.shape[3])
    masks = {f"box {seed}": boxes(len(images), size, share, seed) for seed in seeds}
    masks["attended"] = attended(model, images, share)
    result = {"whole": scores(model, whole, whole)}
    for name, mask in masks.items():
        rows = rows_of(model, images * ~mask.unsqueeze(1))
        result[name] = scores(model, replace(whole, rows=rows), whole)
    return result


def scores(model: SimilarityModel, queries: Embedded, gallery: Embedded) -> tuple[float, float]:
    """Recall@1 and MAP@R in percent; a query's own picture and its vendor are left out."""
    result = ranked_retrieval(model, queries, gallery, ranks=(1,), grouped=True)
    return 100 * result.recall[1], 100 * result.map_at_r


def averaged(result: Mapping[str, tuple[float, float]]) -> list[str]:
    """Cells of a row: whole, box (mean over seeds), attended."""
    several = [value for name, value in result.items() if name.startswith("box")]
    box = tuple(sum(pair[n] for pair in several) / len(several) for n in (0, 1))
    return [f"{a:.1f} / {b:.1f}" for a, b in (result["whole"], box, result["attended"])]


def main() -> None:
    """Measures and writes the page; prints it where no file is named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="one sub-folder of pictures per class")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--share", type=float, default=0.25, help="of the area that is hidden")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the boxes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        "| Recall@1 / MAP@R in % | whole | a rectangle hidden | what it attends hidden |",
        "|" + " --- |" * 4,
    ]
    for given in args.model:
        name, _, path = given.partition("=")
        cells = averaged(measure(load_model(path), args.folder, args.share, args.seeds))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    publish("\n".join([*lines, ""]), args.out)


if __name__ == "__main__":
    main()

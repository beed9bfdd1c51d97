"""A shard of a batch: its rows explained, its records, maps and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simexplain.batching.folder import FIGURES, HEATMAPS, BatchFolder, maps_name
from simexplain.batching.row_explaining import RowExplainer
from simexplain.batching.table import Record, explained, failed
from simexplain.errors import OutputError, SimexplainError, first_line
from simexplain.explanation import Explanation
from simexplain.results.result import content_of

TENSORS = ("maps", "weights", "scores", "distances", "moved", "unexplained")
"""What a shard has of each row under ``KEY/NAME``, beside ``KEY/layer_N`` of several layers."""
OF_ROWS = ("maps", "weights", "scores")
"""What it has of each further row of maps, under ``KEY/rowN_NAME``."""
PICTURE = "picture"
"""What a shard has of each picture, once for all rows: its embedding under ``picture/NUMBER``."""

Listener = Callable[[int], None]


@dataclass(frozen=True)
class ShardWriter:
    """Explains shards and writes them.

    Attributes:
        explainer: For the rows.
        folder: Where to.
        pictures: Draw a heatmap over every picture.
        figures: Draw a figure of every row.
    """

    explainer: RowExplainer
    folder: BatchFolder
    pictures: bool = False
    figures: bool = False

    def write(self, shard: int, listener: Listener | None = None) -> None:
        """Explains the rows of a shard and writes all that came of it.

        A row that cannot be explained becomes a record with the reason.

        Args:
            shard: Its number.
            listener: Called after each row with the rows of the shard that are done.

        Raises:
            OutputError: If a file cannot be written.
        """
        plan = self.explainer.plan
        records: list[Record] = []
        tensors: dict[str, Tensor] = {}
        for done, row in enumerate(plan.shards[shard], start=1):
            explanation = self._explained(row)
            if isinstance(explanation, str):
                records.append(failed(row, plan.rows[row], explanation))
            else:
                key = str(row)
                file, images = maps_name(shard), plan.images[row]
                records.append(explained(row, plan.rows[row], images, explanation, (file, key)))
                tensors |= {
                    f"{key}/{name}": value for name, value in tensors_of(explanation).items()
                }
                for image, embedding in zip(images, explanation.embeddings[0], strict=True):
                    tensors.setdefault(f"{PICTURE}/{image}", embedding.detach().cpu().clone())
            if listener is not None:
                listener(done)
        self.folder.write_shard(shard, records, tensors)

    def _explained(self, row: int) -> Explanation | str:
        """A row's explanation, or why there is none."""
        try:
            try:
                return self._tried(row)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # What strikes from outside, such as the end of another process, is not the row's
                # fault, and must not stand in the table: what is, comes again.
                return self._tried(row)
        except (torch.OutOfMemoryError, OutputError):
            raise
        except SimexplainError as error:
            return str(error)
        except RuntimeError as error:  # what a network raises of pictures that it cannot take
            if "memory" in str(error):
                raise
            return f"The network failed ({first_line(error)})."

    def _tried(self, row: int) -> Explanation:
        explanation = self.explainer.explain(row)
        if self.pictures or self.figures:
            self._draw(row, self.explainer.pictured(row, explanation))
        return explanation

    def _draw(self, row: int, explanation: Explanation) -> None:
        if self.figures:
            self.folder.write(f"{FIGURES}/{row:06d}.png", content_of(explanation.figure()))
        for index, role in enumerate(explanation.roles if self.pictures else ()):
            drawn = content_of(explanation.heated(index))
            self.folder.write(f"{HEATMAPS}/{row:06d}_{index}_{role}.png", drawn)


def tensors_of(explanation: Explanation) -> dict[str, Tensor]:
    """The tensors of an explanation of one row, on the CPU."""
    named = {name: getattr(explanation, name) for name in TENSORS} | _layers_of(explanation, "")
    for number, row in enumerate(explanation.others, start=2):
        named |= {f"row{number}_{name}": getattr(row, name) for name in OF_ROWS}
        named |= _layers_of(row, f"row{number}_")
    # A copy of its own each: safetensors refuses tensors that share memory.
    return {
        name: value[0].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in named.items()
        if value is not None
    }


def _layers_of(row: Explanation, mark: str) -> dict[str, Tensor]:
    """The maps of each layer, where they are not those of the row."""
    if len(row.layers) == 1 and torch.equal(row.layer_maps[row.layers[0]], row.maps):
        return {}
    layers = enumerate(row.layers)
    return {f"{mark}layer_{number}": row.layer_maps[layer] for number, layer in layers}

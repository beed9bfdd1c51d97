"""Where AVSL's text and its published code differ: every difference is one option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from simexplain.arguments import typed
from simexplain.errors import ModelError
from simexplain.graph.inference import CERTAINTIES, POOLINGS

TIES = ("first", "all")
ORPHANS = ("keep", "drop")
ETAS = ("raw", "standardised")
INFERENCES = {
    "full": "unreliable nodes are corrected from the level below along edges (the paper)",
    "reliable": "the top level alone, each node weighted by its reliability",
    "top": "the top level alone",
    "levels": "the mean of all levels, that of their concatenated embeddings at unit length",
}
"""How a distance is inferred from the nodes; all but ``full`` are ablations (Table 2)."""
ORIGINS = {
    "untrained": "heads that were never trained: its nodes mean nothing yet",
    "labelled": "heads trained on the frozen network from labelled images",
    "unlabelled": "PCA heads and edges from images alone, without labels",
    "trained": "network and heads trained together",
}
"""How the heads, edges and reliabilities of a model were made; recorded in every result."""


@dataclass(frozen=True)
@typed
class AVSLOptions:
    """How the AVSL graph is computed; the defaults follow the paper's text.

    Attributes:
        pooling: Before each head: ``avg``, ``max`` or ``avg+max``.
        bias: Whether heads have a bias, which then stands at every position of a CAM.
        certainty: How a CAM is normalised before its standard deviation is taken (Eq. 5), a name
            in ``CERTAINTIES``.
        scale: Multiplies alpha and beta inside the sigmoid of Eq. 6.
        k: How many lower nodes may stand in for a higher one (Eq. 7).
        ties: Where edges are equally strong at the k-th place: ``first`` keeps exactly ``k``,
            ``all`` keeps every one of them.
        epsilon: Added to the sum that edges are divided by (Eq. 8).
        orphans: A node without any positive edge: ``keep`` its own value with reliability 1, or
            ``drop`` its unreliable share.
        momentum: Gamma of Eq. 4. The first batch always sets the edges.
        eta: How ``eta`` of Eq. 5 enters Eq. 6. ``raw``: as it is (the paper); it spans about a
            thousandth, so that alpha matters once it is in the hundreds. ``standardised``: minus
            its mean and over its standard deviation in training, which gives alpha and beta one
            scale.
        inference: How a distance is inferred, a name in :data:`INFERENCES`.
    """

    pooling: str = "avg"
    bias: bool = False
    certainty: str = "l2"
    scale: float = 1.0
    k: int = 128
    ties: str = "first"
    epsilon: float = 0.0
    orphans: str = "keep"
    momentum: float = 0.5
    eta: str = "raw"
    inference: str = "full"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "pooling": POOLINGS,
            "certainty": tuple(CERTAINTIES),
            "ties": TIES,
            "orphans": ORPHANS,
            "eta": ETAS,
            "inference": tuple(INFERENCES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ModelError(
                    f"Expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.k < 1 or not self.scale > 0 or not self.epsilon >= 0:
            raise ModelError(
                f"Expected k >= 1, scale > 0 and epsilon >= 0, got k={self.k}, "
                f"scale={self.scale}, epsilon={self.epsilon}."
            )
        if not 0 <= self.momentum < 1:
            raise ModelError(f"Expected momentum in [0, 1), got {self.momentum}.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON from which :meth:`from_json` makes an equal object."""
        return asdict(self)

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> AVSLOptions:
        """The counterpart of :meth:`to_json`."""
        return cls(**options)


PRESETS = {
    "paper": AVSLOptions(),
    "official": AVSLOptions(
        pooling="avg+max",
        bias=True,
        certainty="row_min_l1",
        scale=10.0,
        ties="all",
        epsilon=1e-8,
        orphans="drop",
    ),
}
"""``paper`` follows the text of AVSL, ``official`` the code its authors published."""


def avsl_options(preset: str | AVSLOptions) -> AVSLOptions:
    """The options of a preset by name; options are passed through.

    Raises:
        ModelError: If the preset does not exist.
    """
    if isinstance(preset, AVSLOptions):
        return preset
    if preset not in PRESETS:
        raise ModelError(f"Expected a preset of {', '.join(PRESETS)}, got {preset!r}.")
    return PRESETS[preset]

"""Training objectives: similarity mining, AVSL, and what they are compared with.

Public names are in ``__init__.pyi``. An ``Objective`` is made of terms (``objective.py``): metric
losses by name (``metric_losses.py``, on distances ``distance_losses.py``), mining (``mining.py``,
with a classification head ``classification.py``), masks (``constraint.py``), AVSL
(``avsl_objective.py``). Maps in a training step are made in ``attention.py``.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

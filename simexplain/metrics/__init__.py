"""How far to believe a map: curves, masks, stability and intervals on plain tensors.

Public: ``deletion`` and ``insertion`` (``curves.py``); ``pointing``, ``energy``, ``iou`` and
``correspondences`` (``maps.py``); ``infidelity``, ``sensitivity``, ``AGREEMENTS`` and
``randomised`` (``stability.py``); bootstrap intervals (``intervals.py``); retrieval
(``ranking.py``).
"""

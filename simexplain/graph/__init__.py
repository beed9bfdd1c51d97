"""The AVSL graph on plain tensors: nodes, reliabilities, edges, distances of all pairs.

Public: ``Graph``, ``Rows`` and ``infer`` (``inference.py``), ``distances`` (``distances.py``),
``exact`` (``tiled.py``), ``neighbours`` (``neighbours.py``).
"""

"""One- and few-shot segmentation from attention maps.

Public: ``segment`` (``segmenting.py``) with its ``Segmentation``, ``evaluate_segmentation``
(``evaluating.py``), ``read_masked`` and ``read_pascal`` (``dataset.py``), ``Cue`` and ``GrabCut``
(``cue.py``).
"""

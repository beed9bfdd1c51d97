"""Drawing: heatmaps over pictures and whole figures.

Public: ``RENDERERS`` (``overlay.py``). Every figure is a sheet of cells (``sheet.py``) with text
that fits (``lettering.py``); those of AVSL are ``graph.py`` and ``ranking.py``.
"""

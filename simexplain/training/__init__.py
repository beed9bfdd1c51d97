"""Training of embedding models on lightning: what `simexplain train` does.

Public: ``train`` (``training.py``) with its ``TrainResult``, ``TrainOptions`` (``options.py``),
``RECIPES`` (``recipes.py``), ``Source`` (``datasource.py``), ``Listeners`` (``recording.py``).
"""

"""Training of embedding models on lightning: what `simexplain train` does.

Public: ``train`` and ``Source`` (``training.py``), ``TrainResult`` (``run_folder.py``),
``TrainOptions`` (``options.py``), ``RECIPES`` (``recipes.py``), ``Listeners`` (``recording.py``).
"""

"""Pictures: reading, preprocessing and the way back; folders and data sets of them.

Public: ``read_picture`` (``images.py``), ``Preprocess`` and ``Geometry`` (``preprocessing.py``),
``Record`` (``folders.py``), ``read_dataset`` and ``DATASETS`` (``datasets.py``), ``AUGMENTATIONS``
and ``TrainingImages`` (``training_set.py``), ``check_training`` (``checking.py``).
"""

"""What results share: saving, loading, JSON and what a notebook shows.

Public: ``Result`` (``result.py``). Fields are kept by their types (``codec.py``); files of version
0.1.0 are read as well (``upgrades.py``).
"""

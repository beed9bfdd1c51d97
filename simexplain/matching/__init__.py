"""Which region of one image answers to which of another: the exact matrix, its pictures, files.

Public: ``match`` (``matching.py``) with its ``Matching`` (``result.py``); ``pair_matrix`` and
``Factors`` (``factors.py``).
"""

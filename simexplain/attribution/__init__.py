"""Taking an AVSL distance apart: the account, its pictures and files, and the verbs.

Public: ``attribute`` (``attributing.py``) with its ``Attribution``, an ``Account`` (``result.py``).
"""

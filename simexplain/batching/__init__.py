"""Thousands of comparisons: shared images embedded once, resumable, over several processes.

Public: ``explain_batch`` (``batching.py``), ``open_batch`` and ``BatchResult`` (``result.py``),
``BatchOptions`` and ``BatchRow`` (``planning.py``).
"""

"""AVSL post hoc: heads, edges and reliabilities for a network that is already trained.

Public: ``fit`` (``posthoc.py``) and ``build_bank`` (``bank.py``).
"""

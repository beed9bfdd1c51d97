"""How far to believe the maps of a model: faithfulness, pointing and sanity of whole methods.

Public: ``compare`` (``comparing.py``), ``evaluate_faithfulness`` (``evaluating.py``),
``faithfulness`` and ``sanity_check`` (``faithfulness.py``), ``evaluate_retrieval`` and
``evaluate_reid`` (``retrieval.py``), and what they return.
"""

"""Saving evaluations, as functions: what the method ``write`` of each of them does."""

from __future__ import annotations

from simexplain.results.result import Result

save_evaluation = save_retrieval = save_reid = Result.write

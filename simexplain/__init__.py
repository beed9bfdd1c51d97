"""simexplain: why does this model say these images are alike?

Everything here is imported when it is first used, so that ``import simexplain`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simexplain.attribution.attributing import attribute as attribute
    from simexplain.attribution.attributing_files import attribute_files as attribute_files
    from simexplain.attribution.result import Attribution as Attribution
    from simexplain.comparison import Comparison as Comparison
    from simexplain.data.images import read_picture as read_picture
    from simexplain.data.preprocessing import Preprocess as Preprocess
    from simexplain.errors import SimexplainError as SimexplainError
    from simexplain.evaluation.comparing import compare_files as compare_files
    from simexplain.evaluation.comparing import compare_methods as compare_methods
    from simexplain.evaluation.comparison_result import MethodComparison as MethodComparison
    from simexplain.evaluation.evaluating import evaluate_faithfulness as evaluate_faithfulness
    from simexplain.evaluation.faithfulness import faithfulness as faithfulness
    from simexplain.evaluation.item_sources import read_comparisons as read_comparisons
    from simexplain.evaluation.item_sources import sample_comparisons as sample_comparisons
    from simexplain.evaluation.items import Item as Item
    from simexplain.evaluation.sanity import sanity_check as sanity_check
    from simexplain.explaining import explain as explain
    from simexplain.explaining_files import explain_files as explain_files
    from simexplain.explanation import Explanation as Explanation
    from simexplain.fitting.bank import build_bank as build_bank
    from simexplain.fitting.posthoc import fit as fit
    from simexplain.matching.matching import match as match
    from simexplain.matching.matching_files import match_files as match_files
    from simexplain.matching.result import Matching as Matching
    from simexplain.methods import METHODS as METHODS
    from simexplain.methods.cams import CAMS as CAMS
    from simexplain.methods.similarity_attention import SimilarityAttention as SimilarityAttention
    from simexplain.methods.weight_bank import WeightBank as WeightBank
    from simexplain.methods.weights import WEIGHTS as WEIGHTS
    from simexplain.methods.weights import similarity_weights as similarity_weights
    from simexplain.models.accelerating import accelerated as accelerated
    from simexplain.models.avsl import AVSL as AVSL
    from simexplain.models.avsl_options import PRESETS as PRESETS
    from simexplain.models.avsl_options import AVSLOptions as AVSLOptions
    from simexplain.models.base import SimilarityModel as SimilarityModel
    from simexplain.models.embedder import as_similarity_model as as_similarity_model
    from simexplain.models.loading import load_model as load_model
    from simexplain.models.writing import save_model as save_model
    from simexplain.rendering.overlay import RENDERERS as RENDERERS
    from simexplain.tracing import Trace as Trace
    from simexplain.tracing import trace as trace

__version__ = "0.1.0"

_HOMES = {
    "AVSL": "models.avsl",
    "AVSLOptions": "models.avsl_options",
    "Attribution": "attribution.result",
    "CAMS": "methods.cams",
    "Comparison": "comparison",
    "Explanation": "explanation",
    "Item": "evaluation.items",
    "METHODS": "methods",
    "Matching": "matching.result",
    "MethodComparison": "evaluation.comparison_result",
    "PRESETS": "models.avsl_options",
    "Preprocess": "data.preprocessing",
    "RENDERERS": "rendering.overlay",
    "SimexplainError": "errors",
    "SimilarityAttention": "methods.similarity_attention",
    "SimilarityModel": "models.base",
    "Trace": "tracing",
    "WEIGHTS": "methods.weights",
    "WeightBank": "methods.weight_bank",
    "accelerated": "models.accelerating",
    "as_similarity_model": "models.embedder",
    "attribute": "attribution.attributing",
    "attribute_files": "attribution.attributing_files",
    "build_bank": "fitting.bank",
    "compare_files": "evaluation.comparing",
    "compare_methods": "evaluation.comparing",
    "evaluate_faithfulness": "evaluation.evaluating",
    "explain": "explaining",
    "explain_files": "explaining_files",
    "faithfulness": "evaluation.faithfulness",
    "fit": "fitting.posthoc",
    "load_model": "models.loading",
    "match": "matching.matching",
    "match_files": "matching.matching_files",
    "read_comparisons": "evaluation.item_sources",
    "read_picture": "data.images",
    "sample_comparisons": "evaluation.item_sources",
    "sanity_check": "evaluation.sanity",
    "save_model": "models.writing",
    "similarity_weights": "methods.weights",
    "trace": "tracing",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simexplain' has no attribute '{name}'")
    return getattr(import_module(f"simexplain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

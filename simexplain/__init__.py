"""simexplain: why does this model say these images are alike?

Everything here is imported when it is first used, so that ``import simexplain`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simexplain.attribution.attributing import attribute as attribute
    from simexplain.attribution.result import Attribution as Attribution
    from simexplain.batching.batching import explain_batch as explain_batch
    from simexplain.batching.options import BatchOptions as BatchOptions
    from simexplain.batching.result import BatchResult as BatchResult
    from simexplain.batching.result import open_batch as open_batch
    from simexplain.batching.rows import BatchRow as BatchRow
    from simexplain.checking import Agreement as Agreement
    from simexplain.checking import Check as Check
    from simexplain.comparison import Comparison as Comparison
    from simexplain.data.augmenting import AUGMENTATIONS as AUGMENTATIONS
    from simexplain.data.checking import check_training as check_training
    from simexplain.data.dataset_split import DataSplit as DataSplit
    from simexplain.data.datasets import DATASETS as DATASETS
    from simexplain.data.datasets import read_dataset as read_dataset
    from simexplain.data.folders import Record as Record
    from simexplain.data.images import read_picture as read_picture
    from simexplain.data.preprocessing import Preprocess as Preprocess
    from simexplain.data.sampling import ClassBalanced as ClassBalanced
    from simexplain.data.training_set import TrainingImages as TrainingImages
    from simexplain.errors import SimexplainError as SimexplainError
    from simexplain.evaluation.comparing import compare as compare
    from simexplain.evaluation.comparison_result import MethodComparison as MethodComparison
    from simexplain.evaluation.evaluating import evaluate_faithfulness as evaluate_faithfulness
    from simexplain.evaluation.faithfulness import faithfulness as faithfulness
    from simexplain.evaluation.item_sources import read_comparisons as read_comparisons
    from simexplain.evaluation.item_sources import sample_comparisons as sample_comparisons
    from simexplain.evaluation.items import Item as Item
    from simexplain.evaluation.reid import evaluate_reid as evaluate_reid
    from simexplain.evaluation.reid_result import Reidentification as Reidentification
    from simexplain.evaluation.retrieval import evaluate_retrieval as evaluate_retrieval
    from simexplain.evaluation.retrieval_result import Retrieval as Retrieval
    from simexplain.evaluation.sanity import sanity_check as sanity_check
    from simexplain.explaining_files import centroid as centroid
    from simexplain.explaining_files import explain as explain
    from simexplain.explaining_files import explain_against as explain_against
    from simexplain.explanation import Explanation as Explanation
    from simexplain.fitting.bank import build_bank as build_bank
    from simexplain.fitting.posthoc import fit as fit
    from simexplain.losses.avsl_distance import AVSLDistance as AVSLDistance
    from simexplain.losses.avsl_objective import ABLATIONS as ABLATIONS
    from simexplain.losses.avsl_objective import AVSLLoss as AVSLLoss
    from simexplain.losses.classification import ClassHead as ClassHead
    from simexplain.losses.classification import ClassificationLoss as ClassificationLoss
    from simexplain.losses.classification import (
        ClassificationMiningLoss as ClassificationMiningLoss,
    )
    from simexplain.losses.constraint import AttentionMaskLoss as AttentionMaskLoss
    from simexplain.losses.masking import soft_mask as soft_mask
    from simexplain.losses.metric_losses import LOSSES as LOSSES
    from simexplain.losses.metric_losses import metric_loss as metric_loss
    from simexplain.losses.mining import SimilarityMiningLoss as SimilarityMiningLoss
    from simexplain.losses.objective import MetricLoss as MetricLoss
    from simexplain.losses.objective import Objective as Objective
    from simexplain.losses.parameter_groups import parameter_groups as parameter_groups
    from simexplain.losses.quadruplet import QuadrupletLoss as QuadrupletLoss
    from simexplain.matching.matching import match as match
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
    from simexplain.models.loading import load_pair_model as load_pair_model
    from simexplain.models.pairs import PairModel as PairModel
    from simexplain.models.pairs import as_pair_model as as_pair_model
    from simexplain.models.writing import save_model as save_model
    from simexplain.pair_explanation import PairExplanation as PairExplanation
    from simexplain.rendering.overlay import RENDERERS as RENDERERS
    from simexplain.searching.index import build_index as build_index
    from simexplain.searching.index import remove_from_index as remove_from_index
    from simexplain.searching.index import update_index as update_index
    from simexplain.searching.index_gallery import GalleryIndex as GalleryIndex
    from simexplain.searching.index_gallery import open_index as open_index
    from simexplain.searching.search import search as search
    from simexplain.searching.search_result import Hit as Hit
    from simexplain.searching.search_result import SearchResult as SearchResult
    from simexplain.segmentation.cue import Cue as Cue
    from simexplain.segmentation.dataset import SegmentationData as SegmentationData
    from simexplain.segmentation.dataset import read_masked as read_masked
    from simexplain.segmentation.evaluating import evaluate_segmentation as evaluate_segmentation
    from simexplain.segmentation.grabcut import GrabCut as GrabCut
    from simexplain.segmentation.pascal import read_pascal as read_pascal
    from simexplain.segmentation.result import Segmentation as Segmentation
    from simexplain.segmentation.scores import SegmentationScores as SegmentationScores
    from simexplain.segmentation.segmenting import segment as segment
    from simexplain.tracing import Trace as Trace
    from simexplain.tracing import trace as trace
    from simexplain.training.options import TrainOptions as TrainOptions
    from simexplain.training.recipes import RECIPES as RECIPES
    from simexplain.training.result import TrainResult as TrainResult
    from simexplain.training.training import train as train

__version__ = "0.1.0"

_HOMES = {
    "ABLATIONS": "losses.avsl_objective",
    "AUGMENTATIONS": "data.augmenting",
    "AVSL": "models.avsl",
    "AVSLDistance": "losses.avsl_distance",
    "AVSLLoss": "losses.avsl_objective",
    "AVSLOptions": "models.avsl_options",
    "AttentionMaskLoss": "losses.constraint",
    "Attribution": "attribution.result",
    "BatchOptions": "batching.options",
    "BatchResult": "batching.result",
    "BatchRow": "batching.rows",
    "CAMS": "methods.cams",
    "ClassBalanced": "data.sampling",
    "ClassHead": "losses.classification",
    "ClassificationLoss": "losses.classification",
    "ClassificationMiningLoss": "losses.classification",
    "Comparison": "comparison",
    "Cue": "segmentation.cue",
    "DATASETS": "data.datasets",
    "DataSplit": "data.dataset_split",
    "Agreement": "checking",
    "Check": "checking",
    "Explanation": "explanation",
    "GalleryIndex": "searching.index_gallery",
    "GrabCut": "segmentation.grabcut",
    "Hit": "searching.search_result",
    "Item": "evaluation.items",
    "LOSSES": "losses.metric_losses",
    "METHODS": "methods",
    "Matching": "matching.result",
    "MethodComparison": "evaluation.comparison_result",
    "MetricLoss": "losses.objective",
    "Objective": "losses.objective",
    "PRESETS": "models.avsl_options",
    "Preprocess": "data.preprocessing",
    "QuadrupletLoss": "losses.quadruplet",
    "RECIPES": "training.recipes",
    "RENDERERS": "rendering.overlay",
    "Record": "data.folders",
    "Reidentification": "evaluation.reid_result",
    "Retrieval": "evaluation.retrieval_result",
    "Segmentation": "segmentation.result",
    "SegmentationData": "segmentation.dataset",
    "SegmentationScores": "segmentation.scores",
    "SearchResult": "searching.search_result",
    "SimexplainError": "errors",
    "SimilarityAttention": "methods.similarity_attention",
    "SimilarityMiningLoss": "losses.mining",
    "SimilarityModel": "models.base",
    "Trace": "tracing",
    "TrainOptions": "training.options",
    "TrainResult": "training.result",
    "TrainingImages": "data.training_set",
    "WEIGHTS": "methods.weights",
    "WeightBank": "methods.weight_bank",
    "accelerated": "models.accelerating",
    "PairExplanation": "pair_explanation",
    "PairModel": "models.pairs",
    "as_pair_model": "models.pairs",
    "as_similarity_model": "models.embedder",
    "attribute": "attribution.attributing",
    "build_bank": "fitting.bank",
    "centroid": "explaining_files",
    "build_index": "searching.index",
    "check_training": "data.checking",
    "evaluate_faithfulness": "evaluation.evaluating",
    "evaluate_reid": "evaluation.reid",
    "evaluate_retrieval": "evaluation.retrieval",
    "evaluate_segmentation": "segmentation.evaluating",
    "compare": "evaluation.comparing",
    "explain": "explaining_files",
    "explain_against": "explaining_files",
    "explain_batch": "batching.batching",
    "faithfulness": "evaluation.faithfulness",
    "fit": "fitting.posthoc",
    "load_model": "models.loading",
    "load_pair_model": "models.loading",
    "match": "matching.matching",
    "metric_loss": "losses.metric_losses",
    "open_index": "searching.index_gallery",
    "open_batch": "batching.result",
    "parameter_groups": "losses.parameter_groups",
    "read_comparisons": "evaluation.item_sources",
    "read_dataset": "data.datasets",
    "read_masked": "segmentation.dataset",
    "read_pascal": "segmentation.pascal",
    "read_picture": "data.images",
    "remove_from_index": "searching.index",
    "sample_comparisons": "evaluation.item_sources",
    "sanity_check": "evaluation.sanity",
    "save_model": "models.writing",
    "segment": "segmentation.segmenting",
    "search": "searching.search",
    "similarity_weights": "methods.weights",
    "soft_mask": "losses.masking",
    "trace": "tracing",
    "train": "training.training",
    "update_index": "searching.index",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from simexplain.renaming import RENAMED_VERBS, old_verb

        if name in RENAMED_VERBS:
            return old_verb(name, __getattr__(RENAMED_VERBS[name][0]))
        raise AttributeError(f"module 'simexplain' has no attribute '{name}'")
    return getattr(import_module(f"simexplain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

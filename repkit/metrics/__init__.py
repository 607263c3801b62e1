"""Measures of embeddings and predictions: pure functions of arrays, for a notebook as much as for `repkit.evaluate`."""

from repkit.metrics.attention import head_cosines
from repkit.metrics.classification import confusion_matrix, mean_per_class_accuracy, top_k_accuracy
from repkit.metrics.geometry import alignment, effective_rank, modality_gap, uniformity
from repkit.metrics.retrieval import NEVER_FOUND, match_ranks, median_rank, recall_at_k

__all__ = [
    "NEVER_FOUND",
    "alignment",
    "confusion_matrix",
    "effective_rank",
    "head_cosines",
    "match_ranks",
    "mean_per_class_accuracy",
    "median_rank",
    "modality_gap",
    "recall_at_k",
    "top_k_accuracy",
    "uniformity",
]

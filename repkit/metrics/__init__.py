"""Measures of embeddings, predictions and texts: pure functions, for a notebook as much as for `repkit.evaluate`."""

from repkit.metrics.attention import head_cosines
from repkit.metrics.classification import confusion_matrix, mean_per_class_accuracy, top_k_accuracy
from repkit.metrics.geometry import alignment, effective_rank, modality_gap, uniformity
from repkit.metrics.language import bleu4, cider_d, exact_match, most_common_answers, normalize_answer, vqa_accuracy
from repkit.metrics.retrieval import NEVER_FOUND, match_ranks, median_rank, recall_at_k

__all__ = [
    "NEVER_FOUND",
    "alignment",
    "bleu4",
    "cider_d",
    "confusion_matrix",
    "effective_rank",
    "exact_match",
    "head_cosines",
    "match_ranks",
    "mean_per_class_accuracy",
    "median_rank",
    "modality_gap",
    "most_common_answers",
    "normalize_answer",
    "recall_at_k",
    "top_k_accuracy",
    "uniformity",
    "vqa_accuracy",
]

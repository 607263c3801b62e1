"""Evaluation of trained encoders: loops over data that call `repkit.metrics`, and the results they leave."""

from repkit.evaluate.embed import embed, token_batches
from repkit.evaluate.retrieval import evaluate_retrieval
from repkit.evaluate.zero_shot import class_embeddings, evaluate_zero_shot

__all__ = ["class_embeddings", "embed", "evaluate_retrieval", "evaluate_zero_shot", "token_batches"]

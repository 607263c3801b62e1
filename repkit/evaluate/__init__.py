"""Evaluation of trained models: loops over data that call `repkit.metrics`, and the results they leave."""

from repkit.evaluate.embed import embed, token_batches
from repkit.evaluate.generation import (
    evaluate_answers,
    evaluate_captions,
    evaluate_translations,
    generate_texts,
)
from repkit.evaluate.linear_probe import evaluate_few_shot, evaluate_linear_probe
from repkit.evaluate.results import Result, append_results, format_table, read_results
from repkit.evaluate.retrieval import evaluate_retrieval
from repkit.evaluate.zero_shot import class_scores, evaluate_zero_shot, prompt_embeddings

__all__ = [
    "Result",
    "append_results",
    "class_scores",
    "embed",
    "evaluate_answers",
    "evaluate_captions",
    "evaluate_few_shot",
    "evaluate_linear_probe",
    "evaluate_retrieval",
    "evaluate_translations",
    "evaluate_zero_shot",
    "format_table",
    "generate_texts",
    "prompt_embeddings",
    "read_results",
    "token_batches",
]

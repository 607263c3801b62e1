"""Models in Flax NNX; they return named outputs and know of no loss."""

from repkit.models.encoders import CLIP_TEXT_B, VIT_B_16, TextConfig, TextTransformer, VisionConfig, VisionTransformer
from repkit.models.functional import Model, attention_paths, functional, parameters
from repkit.models.two_tower import TwoTower, TwoTowerConfig, two_tower

__all__ = [
    "CLIP_TEXT_B",
    "VIT_B_16",
    "Model",
    "TextConfig",
    "TextTransformer",
    "TwoTower",
    "TwoTowerConfig",
    "VisionConfig",
    "VisionTransformer",
    "attention_paths",
    "functional",
    "parameters",
    "two_tower",
]

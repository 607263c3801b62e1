"""Models in Flax NNX; they return named outputs and know of no loss."""

from repkit.models.capture import Capture
from repkit.models.encoders import CLIP_TEXT_B, VIT_B_16, TextConfig, TextTransformer, VisionConfig, VisionTransformer
from repkit.models.functional import Model, attention_paths, functional, parameters, restorer, with_learned
from repkit.models.fusion import Fusion, FusionConfig, FusionModel, fusion
from repkit.models.generation import Generated, beam_search
from repkit.models.linen import linen_model
from repkit.models.sequence import SequenceConfig, SequenceModel, SequenceToSequence, sequence_to_sequence
from repkit.models.two_tower import TwoTower, TwoTowerConfig, two_tower

__all__ = [
    "CLIP_TEXT_B",
    "VIT_B_16",
    "Capture",
    "Fusion",
    "FusionConfig",
    "FusionModel",
    "Generated",
    "Model",
    "SequenceConfig",
    "SequenceModel",
    "SequenceToSequence",
    "TextConfig",
    "TextTransformer",
    "TwoTower",
    "TwoTowerConfig",
    "VisionConfig",
    "VisionTransformer",
    "attention_paths",
    "beam_search",
    "functional",
    "fusion",
    "linen_model",
    "parameters",
    "restorer",
    "sequence_to_sequence",
    "two_tower",
    "with_learned",
]

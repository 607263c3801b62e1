"""Losses: pure functions of arrays with one signature.

| what you want | loss |
|---|---|
| one space for pairs of two modalities, with large batches | `info_nce` |
| the same with small batches: a gradient that does not depend on the batch size | `gamma_contrastive` |
| the same, by a moving average and without sampling | `global_contrastive` |
| every pair judged on its own, without a softmax | `sigmoid_contrastive` |
| a contrast that keeps pushing pairs that are well separated | `decoupled_contrastive` |
| two views of one modality | `in_modal_info_nce` |
| pairs, against a momentum teacher's soft targets and a queue of candidates | `queue_contrastive` |
| negatives for image-text matching | `hard_negatives` |
| beside it, room for what only one modality knows | `feature_separation` |
| beside it, features that spread over the whole sphere | `uniformity` |
| beside it, augmented views on a path between the two modalities | `brownian_bridge`, `brownian_bridge_path` |
| beside it, the same arrangement of the batch in both modalities | `geometric_consistency` |
| a small transformer that attends like a large one with other heads | `attention_map_alignment` |
| the same where attention maps are never computed, or too long to hold | `attention_alignment_from_queries_keys` |
| baselines of these, heads matched by number | `one_to_one_attention`, `mean_head_attention` |
| baselines of these, heads mixed by learned or given shares | `mixed_head_attention`, `merged_head_attention` |
| the same from relations between queries, keys or values (MiniLM) | `attention_relation_distillation` |
| a student that predicts what its teacher predicts | `logit_distillation` |
| a student whose hidden states are its teacher's | `hidden_state_distillation` |
| text from a model that generates, or fills in masked tokens | `caption_cross_entropy` |
| classes | `classification_cross_entropy` |

Every loss is called as `loss(arrays, ..., *, hyper-parameters, form, key, where, weights, axis_name, reduction)`; one
with state takes a `memory` and returns `(loss, memory)`. Embeddings are used as given: normalise them first
(`repkit.numerics.normalize`) where the loss is meant for unit vectors, which is all that take embeddings. No matrix of
all pairs is ever held, unless `form="plain"` asks for the formula as it reads; `over_mesh` splits a loss over devices.
"""

from repkit.losses._memory import LogPartitionMemory, init_memory
from repkit.losses.attention import (
    MapProjection,
    attention_alignment_from_queries_keys,
    attention_map_alignment,
    mean_head_attention,
    merged_head_attention,
    mixed_head_attention,
    one_to_one_attention,
)
from repkit.losses.bridge import brownian_bridge, brownian_bridge_path
from repkit.losses.classification import classification_cross_entropy
from repkit.losses.contrastive import (
    decoupled_contrastive,
    global_contrastive,
    in_modal_info_nce,
    info_nce,
    sigmoid_contrastive,
)
from repkit.losses.distillation import (
    attention_relation_distillation,
    hidden_state_distillation,
    logit_distillation,
)
from repkit.losses.form import Blocks, Form
from repkit.losses.gamma import gamma_contrastive, sample_rates
from repkit.losses.generation import caption_cross_entropy
from repkit.losses.geometry import geometric_consistency
from repkit.losses.matching import HardNegatives, hard_negatives
from repkit.losses.mesh import over_mesh
from repkit.losses.queue import FeatureQueue, init_queue, queue_contrastive
from repkit.losses.separation import feature_separation
from repkit.losses.uniformity import uniformity

__all__ = [
    "Blocks",
    "FeatureQueue",
    "Form",
    "HardNegatives",
    "LogPartitionMemory",
    "MapProjection",
    "attention_alignment_from_queries_keys",
    "attention_map_alignment",
    "attention_relation_distillation",
    "brownian_bridge",
    "brownian_bridge_path",
    "caption_cross_entropy",
    "classification_cross_entropy",
    "decoupled_contrastive",
    "feature_separation",
    "gamma_contrastive",
    "geometric_consistency",
    "global_contrastive",
    "hard_negatives",
    "hidden_state_distillation",
    "in_modal_info_nce",
    "info_nce",
    "init_memory",
    "init_queue",
    "logit_distillation",
    "mean_head_attention",
    "merged_head_attention",
    "mixed_head_attention",
    "one_to_one_attention",
    "over_mesh",
    "queue_contrastive",
    "sample_rates",
    "sigmoid_contrastive",
    "uniformity",
]

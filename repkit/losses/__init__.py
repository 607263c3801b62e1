"""Losses: pure functions of arrays with one signature.

| what you want | loss |
|---|---|
| one space for pairs of two modalities, with large batches | `info_nce` |
| the same with small batches: a gradient that does not depend on the batch size | `gamma_contrastive` |
| beside it, room for what only one modality knows | `feature_separation` |
| beside it, augmented views on a path between the two modalities | `brownian_bridge`, `brownian_bridge_path` |
| beside it, the same arrangement of the batch in both modalities | `geometric_consistency` |

Every loss is called as `loss(arrays, ..., *, hyper-parameters, key, where, weights, axis_name, reduction)`; one with
state takes a `memory` and returns `(loss, memory)`. Embeddings are used as given: normalise them first
(`repkit.numerics.normalize`) where the loss is meant for unit vectors, which is all of these.
"""

from repkit.losses.bridge import brownian_bridge, brownian_bridge_path
from repkit.losses.contrastive import info_nce
from repkit.losses.form import Blocks, Form
from repkit.losses.gamma import LogPartitionMemory, gamma_contrastive, init_memory, sample_rates
from repkit.losses.geometry import geometric_consistency
from repkit.losses.separation import feature_separation

__all__ = [
    "Blocks",
    "Form",
    "LogPartitionMemory",
    "brownian_bridge",
    "brownian_bridge_path",
    "feature_separation",
    "gamma_contrastive",
    "geometric_consistency",
    "info_nce",
    "init_memory",
    "sample_rates",
]

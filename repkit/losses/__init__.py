"""Losses: pure functions of arrays with one signature.

| your data look like | loss |
|---|---|
| pairs of two modalities, large batches | `info_nce` |
| pairs of two modalities, small batches | `gamma_contrastive` |

Every loss is called as `loss(arrays, ..., *, hyper-parameters, key, where, weights, axis_name, reduction)`; those with
state take a `memory` and return `(loss, memory)`.
"""

from repkit.losses.contrastive import info_nce
from repkit.losses.gamma import LogPartitionMemory, gamma_contrastive, init_memory, sample_rates

__all__ = [
    "LogPartitionMemory",
    "gamma_contrastive",
    "info_nce",
    "init_memory",
    "sample_rates",
]

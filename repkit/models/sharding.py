"""How the parameters of transformers are split over the axes of a mesh, by their paths."""

from jax.sharding import PartitionSpec

TRANSFORMER_RULES = (
    (r"(mlp/up|attention/(query|key|value))/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(mlp/down|attention/output)/kernel", PartitionSpec("tensor", "fsdp")),
)
"""Of every block's matrices: over `tensor` first by columns and then by rows, so that what lies between stays split and
one sum per attention and per MLP is exchanged; the other way over `fsdp`. One's own rules go before them, as the first
match counts; what no rule names is split as `repkit.train.mesh.state_shardings` says."""

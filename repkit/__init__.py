"""Representation learning in JAX.

The losses are in `repkit.losses`; importing this package or the losses brings in JAX and nothing heavier.
"""

__version__ = "0.1.0"

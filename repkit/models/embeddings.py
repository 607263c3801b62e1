"""How images and tokens become vectors: patches of pixels, and tables of learned vectors."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from repkit.checks import InputError

Dtype = Literal["float32", "bfloat16"]
"""Of a model's arithmetic."""


def embedding(rngs: nnx.Rngs, rows: int, width: int, *, std: float = 0.02) -> nnx.Param[Array]:
    """A table of learned vectors [rows width], at the start normal with this standard deviation."""
    return nnx.Param(nnx.initializers.normal(std)(rngs.params(), (rows, width), jnp.float32))


def embed(table: Float[Array, "v width"], token_ids: Int[Array, "*shape"]) -> Float[Array, "*shape width"]:
    """The vectors of token ids; NaN for an id outside the vocabulary, so that it is noticed."""
    return jnp.take(table, token_ids, axis=0, mode="fill", fill_value=jnp.nan)


def token_logits(tokens: Float[Array, "*shape width"], table: Float[Array, "v width"]) -> Float[Array, "*shape v"]:
    """The table of embeddings as an output layer: inner products with its rows, in float32."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    logits = jnp.einsum("nd,vd->nv", rows, table.astype(rows.dtype), preferred_element_type=jnp.float32)
    return logits.reshape(*tokens.shape[:-1], -1)


def patches(
    image: UInt8[Array, "b h w 3"], image_size: int, patch_size: int, dtype: Dtype
) -> Float[Array, "b n 3*patch_size**2"]:
    """The pixels of the patches of images, row by row, scaled from 0 to 255 to [-1, 1].

    Raises:
        InputError: for images of another shape or dtype.

    Example:
        >>> patches(jnp.zeros((1, 8, 8, 3), jnp.uint8), 8, 4, "float32").shape
        (1, 4, 48)
    """
    if image.shape[1:] != (image_size, image_size, 3) or image.dtype != jnp.uint8:
        raise InputError(
            f"the images must be uint8 of shape [b {image_size} {image_size} 3], "
            f"got {image.dtype} of shape {list(image.shape)}"
        )
    across = image_size // patch_size
    pixels = image.reshape(len(image), across, patch_size, across, patch_size, 3).swapaxes(2, 3)
    return pixels.reshape(len(image), across**2, 3 * patch_size**2).astype(dtype) / 127.5 - 1.0

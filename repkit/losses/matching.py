"""Image-text matching: hard negatives drawn from the contrastive scores, without a pair matrix."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from repkit.checks import InputError, require_arrays, require_key
from repkit.losses._pairs import Best, Side, Tile, embeddings, walk_pairs
from repkit.losses.form import Blocks
from repkit.numerics import AxisName, Scalar, row_indices, row_mask, varying


class HardNegatives(NamedTuple):
    """A negative of each row, as its place among all rows of all devices; -1 where there is none.

    Attributes:
        text_of_image: a text that does not belong to the image [b].
        image_of_text: an image that does not belong to the text [b].
    """

    text_of_image: Int[Array, " b"]
    image_of_text: Int[Array, " b"]


def hard_negatives(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    labels: Int[Array, " b"] | None = None,
    form: Blocks = Blocks(),
    key: PRNGKeyArray,
    where: Bool[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
) -> HardNegatives:
    """Draws for each row one negative of the other modality, likelier the higher its contrastive score.

    With `s_ij = logit_scale <image_i, text_j>`, text j is drawn for image i with probability
    `exp(s_ij) / sum_{k in N_i} exp(s_ik)` over the negatives N_i, and image i for text j alike from the column. What is
    drawn has the largest sum of score and Gumbel noise, found in one walk over blocks; a pair's noise depends on the
    key and the pair's place alone, so that neither blocks nor devices change the draw.

    Args:
        image_embeds: [b d], normally of unit length; used as given. No gradient flows.
        text_embeds: [b d], row i belongs to row i of the images.
        logit_scale: scalar that multiplies the inner products; 0 draws evenly.
        labels: [b]; rows with equal labels are no negatives of one another.
        form: the blocks' size, and how rows of other devices arrive; see `repkit.losses.Blocks`.
        key: typed random key, the same on all devices.
        where: [b]; False removes the row as anchor and as candidate.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.

    Returns:
        The negatives. Index an array of all rows with them, and leave out rows that hold -1.

    Raises:
        InputError: shapes that do not fit together, or no key.

    Example:
        >>> embeds = jnp.eye(3)
        >>> drawn = hard_negatives(embeds, jnp.roll(embeds, 1, axis=0), logit_scale=100.0, key=jax.random.key(0))
        >>> print(drawn.text_of_image)  # of image i, the text that looks like it but belongs to image i + 1
        [1 2 0]

    References:
        Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", arXiv
        2107.07651, section 3.2. There the negatives are those of one device.
    """
    require_arrays(
        "hard_negatives",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "logit_scale": (logit_scale, "number"),
            "labels": (labels, "int b"),
            "where": (where, "bool b"),
        },
    )
    if not isinstance(form, Blocks):
        raise InputError(f"hard_negatives: expected form to be losses.Blocks(...), got {form!r}")
    key = require_key("hard_negatives", key, "drawing negatives")
    images, texts = jax.lax.stop_gradient(embeddings(image_embeds, text_embeds, where=where))
    rows, dtype = images.shape[0], jnp.promote_types(images.dtype, jnp.float32)
    valid = varying(row_mask(where, rows).astype(dtype), axis_name)
    places = varying(row_indices(rows, axis_name).astype(jnp.int32), axis_name)
    labels = places if labels is None else varying(labels, axis_name)
    sides = (Side(varying(embeds, axis_name), valid, (places, labels)) for embeds in (images, texts))
    tile = functools.partial(_draw_tile, jnp.asarray(logit_scale, dtype), key)
    walk = walk_pairs(tile, *sides, form=form, axis_name=axis_name, combine="max")

    def drawn(best: Best) -> Int[Array, " b"]:
        return jnp.where((best.score > -jnp.inf) & (valid > 0), best.index, -1)

    return HardNegatives(drawn(walk.row_sums), drawn(walk.column_sums))


def _draw_tile(
    scale: Float[Array, ""], key: PRNGKeyArray, products: Float[Array, "r c"], rows: Side, columns: Side
) -> Tile:
    (row_places, row_labels), (column_places, column_labels) = rows.extra, columns.extra

    def noise(row: Int[Array, ""], column: Int[Array, ""]) -> Float[Array, "2"]:
        pair_key = jax.random.fold_in(jax.random.fold_in(key, row), column)
        return jax.random.gumbel(pair_key, (2,), products.dtype)

    noises = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(row_places, column_places)
    is_negative = row_labels[:, None] != column_labels[None, :]
    is_negative &= (rows.valid > 0)[:, None] & (columns.valid > 0)[None, :]

    def best(noise: Float[Array, "r c"], places: Int[Array, " n"], axis: int) -> Best:
        scores = jnp.where(is_negative, scale * products + noise, -jnp.inf)
        winner = jnp.argmax(scores, axis=axis)
        return Best(jnp.max(scores, axis=axis), places[winner])

    return Tile(best(noises[..., 0], column_places, 1), best(noises[..., 1], row_places, 0), None)

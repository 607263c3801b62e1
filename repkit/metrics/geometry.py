"""Where embeddings lie: the gap between two modalities, how close pairs are, how far all points spread.

All four take embeddings as given; the usual reading needs rows of length 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.checks import InputError
from repkit.numerics import WeightedMean, at_least_float32, mask_rows, masked_logsumexp, row_mask


def modality_gap(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "c d"],
    *,
    image_where: Bool[Array, " b"] | None = None,
    text_where: Bool[Array, " c"] | None = None,
) -> Float[Array, ""]:
    """The distance between the centres of two modalities.

        gap = | mean_i image_i - mean_j text_j |_2

    Args:
        image_embeds: embeddings of one modality.
        text_embeds: embeddings of the other; the rows need not be pairs.
        image_where: False leaves the image out.
        text_where: False leaves the text out.

    Returns:
        A scalar, in [0, 2] for rows of length 1. 0 says that the centres coincide, not that pairs do.

    Raises:
        InputError: feature sizes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> float(modality_gap(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, -1.0]])))
        1.0

    References:
        Liang et al., Mind the Gap, NeurIPS 2022, arXiv 2203.02053, section 2.
    """
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise InputError(
            "modality_gap: expected image_embeds [b d] and text_embeds [c d], got "
            f"image_embeds {image_embeds.shape} and text_embeds {text_embeds.shape}"
        )
    return jnp.linalg.norm(_centre(image_embeds, image_where) - _centre(text_embeds, text_where))


def alignment(
    first: Float[Array, "b d"],
    second: Float[Array, "b d"],
    *,
    exponent: float = 2.0,
    where: Bool[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """The mean distance of pairs, to the power of `exponent`.

        alignment = mean_i |first_i - second_i|_2 ^ exponent

    Args:
        first: one row per pair.
        second: the partners, row by row.
        exponent: alpha of the paper, above 0; 2 is its default.
        where: False leaves the pair out.

    Returns:
        A scalar, in [0, 2^exponent] for rows of length 1; lower is closer. 0 without pairs.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> float(alignment(jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])))
        1.0

    References:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere, ICML 2020, arXiv 2005.10242, section 4.1.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise InputError(
            "alignment: expected first and second [b d] of one shape, got "
            f"first {first.shape} and second {second.shape}"
        )
    squared = jnp.sum((at_least_float32(first) - at_least_float32(second)) ** 2, axis=1)
    return WeightedMean.of(squared ** (exponent / 2), where=where).value()


def uniformity(
    embeds: Float[Array, "b d"], *, scale: float = 2.0, where: Bool[Array, " b"] | None = None, block: int = 1024
) -> Float[Array, ""]:
    """How evenly points cover the sphere: the log of the mean Gaussian potential over all pairs.

        uniformity = log mean_{i != j} exp(-scale |x_i - x_j|_2^2)

    Args:
        embeds: one row per point.
        scale: t of the paper, above 0; 2 is its default.
        where: False leaves the point out.
        block: points compared at a time. Memory is `block x b`; the whole `b x b` matrix never exists.

    Returns:
        A scalar, at most 0 (all points in one place); lower is more even. NaN with fewer than two points.

    Raises:
        InputError: embeds that is not a matrix, or a block below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(uniformity(jnp.array([[1.0, 0.0], [-1.0, 0.0]]))), 3)
        -8.0

    References:
        Wang and Isola, ICML 2020, arXiv 2005.10242, section 4.1.
    """
    _check_matrix("uniformity", embeds)
    if block < 1:
        raise InputError(f"uniformity: expected a block of at least 1, got {block}")
    return _uniformity(embeds, where, scale, min(block, max(len(embeds), 1)))


@partial(jax.jit, static_argnames="block")
def _uniformity(embeds, where, scale, block):
    points = at_least_float32(embeds)
    valid = row_mask(where, len(points))
    points = mask_rows(points, valid)
    count = len(points)
    blocks = -(-count // block)
    index = jnp.arange(count)

    def log_potential(rows):
        point, at = rows
        # The dot product must not lose bits: it is subtracted from numbers of its own size.
        dots = jnp.matmul(point, points.T, precision=jax.lax.Precision.HIGHEST)
        squared = jnp.sum(point**2, axis=1)[:, None] + jnp.sum(points**2, axis=1)[None, :] - 2 * dots
        pair = valid[None, :] & valid[at][:, None] & (at[:, None] != index[None, :]) & (at[:, None] < count)
        return masked_logsumexp(-scale * jnp.maximum(squared, 0.0), pair)

    padded = jnp.pad(points, ((0, blocks * block - count), (0, 0))).reshape(blocks, block, -1)
    total = jax.nn.logsumexp(jax.lax.map(log_potential, (padded, jnp.arange(blocks * block).reshape(blocks, block))))
    number = jnp.sum(valid).astype(total.dtype)
    return jnp.where(number > 1, total - jnp.log(number) - jnp.log(number - 1), jnp.nan)


def effective_rank(embeds: Float[Array, "b d"], *, where: Bool[Array, " b"] | None = None) -> Float[Array, ""]:
    """How many directions the embeddings use, as a real number.

        p_k = s_k / sum_l s_l,  s the singular values of embeds        effective rank = exp(-sum_k p_k log p_k)

    The embeddings are not centred, as in both papers: points that fill a narrow cone count as few directions.

    Args:
        embeds: one row per point.
        where: False leaves the point out.

    Returns:
        A scalar in [1, min(b, d)]; 1 when all rows are parallel, and when all are zero.

    Raises:
        InputError: embeds that is not a matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(effective_rank(jnp.eye(4))), 4)
        4.0

    References:
        Roy and Vetterli, The effective rank, EUSIPCO 2007, section 2; Garrido et al., RankMe, ICML 2023,
        arXiv 2210.02885, equation 1.
    """
    _check_matrix("effective_rank", embeds)
    points = at_least_float32(embeds)
    if where is not None:
        points = mask_rows(points, where)
    singular = jnp.linalg.svd(points, compute_uv=False)
    total = jnp.sum(singular)
    share = singular / jnp.where(total > 0, total, 1.0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))


def _centre(embeds: Float[Array, "b d"], where: Bool[Array, " b"] | None) -> Float[Array, " d"]:
    embeds = at_least_float32(embeds)
    if where is None:
        return jnp.mean(embeds, axis=0)
    return jnp.sum(mask_rows(embeds, where), axis=0) / jnp.maximum(jnp.sum(where), 1)


def _check_matrix(name: str, embeds: Array) -> None:
    if embeds.ndim != 2:
        raise InputError(f"{name}: expected embeds [b d], got embeds {embeds.shape}")

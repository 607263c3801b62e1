"""Brownian bridge: an augmented view lies on a path between the two modalities of its pair."""

import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from repkit.checks import InputError, require_arrays, require_choice, require_key, require_range
from repkit.numerics import AxisName, Reduction, local_rows, mask_rows, reduce_loss, row_count, same_precision

SAMPLED_TIMES = (0.05, 0.95)
"""The interval of sampled times; the likelihood's weight 1/(2 t (1 - t)) has no finite mean over all of (0, 1)."""


def brownian_bridge(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    augmented_embeds: Float[Array, "b d"],
    *,
    time: float | Float[Array, ""] | Float[Array, " b"] | Literal["sampled"] = 0.25,
    key: PRNGKeyArray | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Squared distance of an augmented view to the mean of the Brownian bridge from its text to its image.

        mu(t) = (t V + (1 - t) T) / |t V + (1 - t) T|
        loss  = |z^a - mu(t)|^2                            time fixed
        loss  = |z^a - mu(t)|^2 / (2 t (1 - t))            time sampled: the bridge's variance at t is t (1 - t)

    Args:
        image_embeds: V, the end of the bridge at time 1 [b d], normally of unit length; used as given.
        text_embeds: T, the end at time 0 [b d].
        augmented_embeds: z^a, features of an augmented view of the image, or of the text [b d]. Where they come from a
            momentum encoder, apply `jax.lax.stop_gradient` first.
        time: t in [0, 1], for all rows or per row [b]; "sampled" draws it per row, uniformly from `SAMPLED_TIMES`.
        key: typed random key, the same on all devices; required for `time="sampled"`.
        where: [b]; False removes the row.
        weights: [b], >= 0; the row's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for rows that are masked. Where the ends are antipodal and
        t = 1/2 (the mean is shorter than 2e-13) there is no mean direction: mu is 0, and no gradient flows to the ends.

    Raises:
        InputError: shapes that do not fit together, a time out of range, a missing key, or an unknown reduction.

    Example:
        >>> image, text = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> print(f"{brownian_bridge(image, text, image, time=0.5):.4f}")  # 2 - sqrt(2)
        0.5858

    References:
        Jiang et al., "Understanding and Constructing Latent Modality Structures in Multi-Modal Representation
        Learning", CVPR 2023, arXiv 2303.05952, with t = 0.25 and augmented images. Sampled times, their weight and
        interval, and views of the text are our additions.
    """
    require_arrays(
        "brownian_bridge",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "augmented_embeds": (augmented_embeds, "float b d"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    rows = image_embeds.shape[0]
    dtype = jnp.promote_types(jnp.result_type(image_embeds, text_embeds, augmented_embeds), jnp.float32)
    if isinstance(time, str):
        require_choice("time", time, ["sampled"])
        key = require_key("brownian_bridge", key, 'time="sampled"')
        low, high = SAMPLED_TIMES
        # Every device draws for all rows and keeps its own, so that the draw does not depend on the number of devices.
        times = jax.random.uniform(key, (row_count(rows, axis_name),), dtype, low, high)
        t = local_rows(times, axis_name)
        scale = 1 / (2 * t * (1 - t))
    else:
        require_range("brownian_bridge", "time", time, at_least=0, at_most=1)
        t = _time_per_row(time, rows, dtype)
        scale = jnp.ones_like(t)

    @jax.checkpoint
    def distances(image_embeds: Array, text_embeds: Array, augmented_embeds: Array) -> Float[Array, " b"]:
        images, texts, views = same_precision(image_embeds, text_embeds, augmented_embeds, where=None)
        # Masked where the three arrays have met: three masked copies would have to be written first.
        mean = _direction(mask_rows(_interpolate(images, texts, t[:, None]), where))
        return jnp.sum(jnp.square(mask_rows(views - mean, where)), axis=-1)

    # What the backward pass needs is computed again from the inputs: it costs less than writing and reading it.
    losses = scale * distances(image_embeds, text_embeds, augmented_embeds)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def brownian_bridge_path(
    image_embeds: Float[Array, "b d"],
    text_embeds: Float[Array, "b d"],
    path_embeds: Float[Array, "b p d"],
    *,
    times: tuple[float, ...],
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Negative log-likelihood, up to a constant, of several augmented views as points on one Brownian bridge.

    With the residuals `r_i = z_i - mu(t_i)` of `brownian_bridge`'s mean and the bridge's covariance
    `C_st = min(s, t) (1 - max(s, t))`:

        loss = 1/2 sum_ij (C^-1)_ij <r_i, r_j> = 1/2 sum_{i=0..p} |r_{i+1} - r_i|^2 / (t_{i+1} - t_i)

    where t_0 = 0, t_{p+1} = 1 and r_0 = r_{p+1} = 0. For one point it is `|r|^2 / (2 t (1 - t))`.

    Args:
        image_embeds: V, the end of the bridge at time 1 [b d], normally of unit length; used as given.
        text_embeds: T, the end at time 0 [b d].
        path_embeds: features of p augmented views, in the order of their times [b p d].
        times: the p times, increasing, strictly between 0 and 1.
        where: [b]; False removes the row.
        weights: [b], >= 0; the row's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the rows are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for rows that are masked.

    Raises:
        InputError: shapes that do not fit together, times out of order or range, or an unknown reduction.

    Example:
        >>> image, text = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> path = jnp.stack([text, image], axis=1)
        >>> print(f"{brownian_bridge_path(image, text, path, times=(0.25, 0.75)):.4f}")
        0.6807

    References:
        The bridge is that of Jiang et al., CVPR 2023, arXiv 2303.05952, which uses one point; the likelihood
        of several is our extension.
    """
    require_arrays(
        "brownian_bridge_path",
        {
            "image_embeds": (image_embeds, "float b d"),
            "text_embeds": (text_embeds, "float b d"),
            "path_embeds": (path_embeds, "float b p d"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    points = path_embeds.shape[1]
    ends = (0.0, *times, 1.0)
    if len(times) != points or not all(before < after for before, after in itertools.pairwise(ends)):
        raise InputError(
            f"brownian_bridge_path: expected {points} increasing times strictly between 0 and 1, "
            f"one per point of path_embeds, got times {tuple(times)}"
        )
    images, texts, views = same_precision(image_embeds, text_embeds, path_embeds, where=where)
    t = jnp.asarray(times, images.dtype)[None, :, None]
    residuals = views - _direction(_interpolate(images[:, None, :], texts[:, None, :], t))
    steps = jnp.diff(jnp.pad(residuals, ((0, 0), (1, 1), (0, 0))), axis=1)
    durations = jnp.diff(jnp.asarray(ends, images.dtype))
    losses = jnp.sum(jnp.sum(jnp.square(steps), axis=-1) / (2 * durations)[None, :], axis=-1)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _time_per_row(time: float | Array, rows: int, dtype: jnp.dtype) -> Float[Array, " b"]:
    t = jnp.asarray(time, dtype)
    if t.shape not in ((), (rows,)):
        raise InputError(f"brownian_bridge: expected time to be a number or one per row [{rows}], got shape {t.shape}")
    return jnp.broadcast_to(t, (rows,))


def _interpolate(
    images: Float[Array, "*shape d"], texts: Float[Array, "*shape d"], t: Float[Array, "*shape 1"]
) -> Float[Array, "*shape d"]:
    return t * images + (1 - t) * texts


def _direction(mean: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
    """As `normalize`, without its reading of all rows for their scale; 0 for a mean that is shorter than 2e-13.

    Of unit vectors such a mean is rounding, and the derivative of its direction is computed from the third power of its
    inverse length, which float32 cannot hold.
    """
    squares = jnp.sum(jnp.square(mean), axis=-1, keepdims=True)
    is_zero = squares < jnp.finfo(jnp.float32).tiny ** (2 / 3)
    return mean * jnp.where(is_zero, 0.0, jax.lax.rsqrt(jnp.where(is_zero, 1.0, squares)))

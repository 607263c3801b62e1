"""Sums of softplus over the rows of a pair matrix, from which the sigmoid loss is made."""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from repkit.losses._pairs import (
    Side,
    Tile,
    Walk,
    foreseen_factor,
    is_one_tile,
    pair_products,
    row_products,
    row_sums,
    unless,
    walk_pairs,
)
from repkit.losses.form import Blocks, Form
from repkit.numerics import AxisName, Scalar, at_least_float32, row_indices, row_mask, rows_over, varying


def sigmoid_sums(
    images: Float[Array, "b d"],
    texts: Float[Array, "b d"],
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    labels: Int[Array, " b"] | None,
    where: Bool[Array, " b"] | None,
    weights: Float[Array, " b"] | None,
    form: Form,
    axis_name: AxisName | None,
) -> Float[Array, " b"]:
    """`sum_j log(1 + exp(-z_ij (logit_scale <image_i, text_j> + logit_bias)))`, z_ij = 1 for equal labels and else -1.

    Masked rows must hold 0. `weights` are the shares with which the sums will be reduced; the gradient is ready at the
    end of the forward walk if they are, and right in any case.
    """
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    valid = varying(row_mask(where, images.shape[0]), axis_name)
    scale, bias = (varying(jnp.asarray(x, dtype), axis_name) for x in (logit_scale, logit_bias))
    labels = varying(row_indices(images.shape[0], axis_name) if labels is None else labels, axis_name)
    if isinstance(form, Blocks):
        shares = valid.astype(dtype) if weights is None else jnp.where(valid, weights.astype(dtype), 0.0)
        rows = Side(varying(images, axis_name), valid.astype(dtype), (labels, varying(shares, axis_name)))
        columns = Side(varying(texts, axis_name), valid.astype(dtype), labels)
        return _blocked_sums((form, axis_name), rows, columns, scale, bias)
    images, texts = at_least_float32(images), at_least_float32(texts)
    logits = scale * pair_products(images, rows_over(texts, axis_name)) + bias
    is_positive = labels[:, None] == rows_over(labels, axis_name)[None, :]
    values = jax.nn.softplus(jnp.where(is_positive, -logits, logits))
    allowed = valid[:, None] & rows_over(valid, axis_name)[None, :]
    return jnp.sum(jnp.where(allowed, values, 0.0), axis=-1)


_Static: TypeAlias = tuple[Blocks, AxisName | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked_sums(
    static: _Static, images: Side, texts: Side, scale: Float[Array, ""], bias: Float[Array, ""]
) -> Float[Array, " b"]:
    form, axis_name = static
    walk = walk_pairs(functools.partial(_value_tile, scale, bias), images, texts, form=form, axis_name=axis_name)
    return images.valid * walk.row_sums


def _forward(static, images, texts, scale, bias):
    form, axis_name = static
    products = pair_products(images.embeds, texts.embeds) if is_one_tile(len(images.valid), form, axis_name) else None
    tile = functools.partial(_value_and_slope_tile, scale, bias)
    walk = walk_pairs(tile, images, texts, form=form, axis_name=axis_name, products=products)
    sums, slope_sums = walk.row_sums
    foreseen = walk._replace(row_sums=slope_sums)
    return images.valid * sums, (images, texts, scale, bias, foreseen)


def _backward(static, residuals, cotangents):
    form, axis_name = static
    images, texts, scale, bias, foreseen = residuals
    labels, shares = images.extra
    cotangents = images.valid * cotangents
    factor, is_foreseen = foreseen_factor(cotangents, shares, axis_name)

    def walk_again(one: Float[Array, ""]) -> Walk:
        tile = functools.partial(_value_and_slope_tile, scale, bias)
        rows = images._replace(extra=(labels, one * cotangents))
        walk = walk_pairs(tile, rows, texts, form=form, axis_name=axis_name)
        return walk._replace(row_sums=walk.row_sums[1])

    walk = unless(is_foreseen, walk_again, foreseen)
    factor = jnp.where(is_foreseen, factor, 1.0)

    def side(given: Side, gradient: Float[Array, "b d"]) -> Side:
        return Side((factor * scale * gradient).astype(given.embeds.dtype), jnp.zeros_like(given.valid), None)

    of_scale = factor * jnp.sum(row_products(images.embeds, walk.row_gradient))
    of_bias = factor * jnp.sum(images.valid * walk.row_sums)
    return side(images, walk.row_gradient), side(texts, walk.column_gradient), of_scale, of_bias


_blocked_sums.defvjp(_forward, _backward)


def _signed_logits(
    scale: Float[Array, ""], bias: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side
) -> tuple[Float[Array, "r c"], Bool[Array, "r c"]]:
    """The logits, with the other sign for positives; and which pairs these are."""
    is_positive = rows.extra[0][:, None] == columns.extra[None, :]
    logits = scale * products + bias
    return jnp.where(is_positive, -logits, logits), is_positive


def _value_tile(
    scale: Float[Array, ""], bias: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side
) -> Tile:
    logits, _ = _signed_logits(scale, bias, products, rows, columns)
    return Tile(row_sums(jax.nn.softplus(logits), columns), None, None)


def _value_and_slope_tile(
    scale: Float[Array, ""], bias: Float[Array, ""], products: Float[Array, "r c"], rows: Side, columns: Side
) -> Tile:
    logits, is_positive = _signed_logits(scale, bias, products, rows, columns)
    # softplus and its derivative from one exponential, of a number that is not positive
    small = jnp.exp(-jnp.abs(logits))
    values = jnp.maximum(logits, 0.0) + jnp.log1p(small)
    sigmoid = jnp.where(logits >= 0, 1.0, small) / (1.0 + small)
    slope = jnp.where(is_positive, -sigmoid, sigmoid) * rows.extra[1][:, None]
    return Tile((row_sums(values, columns), row_sums(slope, columns)), None, slope)

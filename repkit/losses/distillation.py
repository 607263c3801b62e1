"""What a student learns from a teacher's predictions, hidden states and relations between tokens.

For attention maps see `repkit.losses.attention`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.checks import InputError, require_arrays, require_range
from repkit.losses._tokens import counting_tokens, mask_vectors, mean_over_tokens
from repkit.numerics import AxisName, Reduction, Scalar, reduce_loss, same_precision


def logit_distillation(
    student_logits: Float[Array, " b *l v"],
    teacher_logits: Float[Array, " b *l v"],
    *,
    temperature: Scalar,
    token_mask: Bool[Array, " b *l"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of the student's predictions from the teacher's, both softened by a temperature.

        loss = mean over tokens of tau^2 KL( softmax(z_t / tau) || softmax(z_s / tau) )

    tau^2 keeps the gradient's size as tau grows: for large tau the loss is `|z_s - z_t|^2 / (2 v)`, of centred logits.
    No digits are lost as the student approaches the teacher: the divergence is a sum of terms that are >= 0.

    Args:
        student_logits: the student's predictions before the softmax, of tokens [b l v] or of whole examples [b v].
        teacher_logits: the teacher's, of the same shape; no gradient flows to it. -inf rules a class out; where only
            the student rules it out, the loss is infinite.
        temperature: tau > 0; 1 compares the predictions as they are. Hinton et al. use 1 to 20.
        token_mask: [b l]; False leaves a token out, whatever it holds.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean. With the numbers of tokens as weights the loss is the mean
            over all tokens.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for an example without a token that counts.

    Raises:
        InputError: shapes that do not fit together, a temperature that is not positive, or an unknown reduction.

    Example:
        >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[0.75, 0.25]]))
        >>> print(f"{logit_distillation(student, teacher, temperature=1.0):.4f}")  # log 2 - the teacher's entropy
        0.1308

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2, for the temperature
        and tau^2. The divergence in place of the cross-entropy, which changes the value by the teacher's entropy and
        leaves the student's gradient as it is, and the mean over tokens are our choices.
    """
    caller = "logit_distillation"
    tokens = _token_axes(student_logits)
    require_arrays(
        caller,
        {
            "student_logits": (student_logits, f"float b {tokens} v"),
            "teacher_logits": (teacher_logits, f"float b {tokens} v"),
            "temperature": (temperature, "number"),
            "token_mask": (token_mask, f"bool b {tokens}"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    require_range(caller, "temperature", temperature, above=0)
    counting = counting_tokens(student_logits.shape[:-1], token_mask, where)

    student, teacher = same_precision(student_logits, jax.lax.stop_gradient(teacher_logits), where=None)
    tau = jnp.asarray(temperature, student.dtype)
    divergences = _divergence(mask_vectors(student, counting) / tau, mask_vectors(teacher, counting) / tau)
    losses = jnp.square(tau) * mean_over_tokens(divergences, counting)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def hidden_state_distillation(
    student_states: Float[Array, "b l d"],
    teacher_states: Float[Array, "b l e"],
    *,
    projection: Float[Array, "d e"] | None = None,
    token_mask: Bool[Array, "b l"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Mean squared difference of hidden states, of which the student's may be projected to the teacher's width.

        loss = mean over tokens and the e features of (h_s W - h_t)^2

    Args:
        student_states: the student's hidden states h_s [b l d]; used as given, without a normalisation.
        teacher_states: the teacher's h_t [b l e]; no gradient flows to it.
        projection: W [d e], learned beside the student; a gradient flows to it. None compares the states as they are,
            which needs d = e.
        token_mask: [b l]; False leaves a token out, whatever it holds.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for an example without a token that counts.

    Raises:
        InputError: shapes that do not fit together, widths that differ without a projection, or an unknown reduction.

    Example:
        >>> student, teacher = jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 5.0, 1.0]]])
        >>> projection = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
        >>> print(f"{hidden_state_distillation(student, teacher, projection=projection):.4f}")  # (0 + 4 + 0) / 3
        1.3333

    References:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv 1909.10351, equation 8, for
        the learned projection. The mean over tokens that count and features, which keeps the loss's size apart from
        the widths and lengths, is our reading of their mean.
    """
    caller = "hidden_state_distillation"
    require_arrays(
        caller,
        {
            "student_states": (student_states, "float b l d"),
            "teacher_states": (teacher_states, "float b l e"),
            "projection": (projection, "float d e"),
            "token_mask": (token_mask, "bool b l"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    width, teacher_width = student_states.shape[-1], teacher_states.shape[-1]
    if projection is None and width != teacher_width:
        got = ", ".join(
            f"{name}: {x.dtype}[{', '.join(map(str, x.shape))}]"
            for name, x in (("student_states", student_states), ("teacher_states", teacher_states))
        )
        raise InputError(
            f"{caller}: expected d = {width}, as in student_states, got d = {teacher_width} in teacher_states; "
            f"states of two widths need a projection [{width}, {teacher_width}]. Got {got}"
        )
    counting = counting_tokens(student_states.shape[:-1], token_mask, where)
    given = [student_states, jax.lax.stop_gradient(teacher_states), *([] if projection is None else [projection])]
    student, teacher, *weight = same_precision(*given, where=None)
    student, teacher = mask_vectors(student, counting), mask_vectors(teacher, counting)
    for matrix in weight:
        student = jnp.einsum("bld,de->ble", student, matrix, precision=jax.lax.Precision.HIGHEST)
    losses = mean_over_tokens(jnp.mean(jnp.square(student - teacher), axis=-1), counting)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def attention_relation_distillation(
    student_vectors: Float[Array, "b hs l ds"],
    teacher_vectors: Float[Array, "b ht l dt"],
    *,
    relation_heads: int,
    token_mask: Bool[Array, "b l"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of the relations between tokens, from the queries, the keys or the values of two attentions (MiniLM).

    The heads' vectors of each token are concatenated and divided anew into r relation heads, so that the numbers of
    heads and their widths may differ between student and teacher:

        R_a  = softmax( V_a V_a^T / sqrt(width of V_a) )            V_a [l, hs ds / r], a = 1 ... r
        loss = mean over relation heads a and query tokens i of KL( R^t_ai || R^s_ai )

    Args:
        student_vectors: the student's queries, keys or values by head [b hs l ds].
        teacher_vectors: the teacher's, of the same kind [b ht l dt]; no gradient flows to it.
        relation_heads: r; it divides `hs ds` and `ht dt`. MiniLM has the heads' own number, MiniLMv2 up to 64.
        token_mask: [b l]; False leaves a token out, as query and as key, whatever it holds.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient for an example without a token that counts.

    Raises:
        InputError: shapes that do not fit together, relation heads that do not divide a width, or an unknown reduction.

    Example:
        >>> teacher = jnp.eye(4).reshape(1, 2, 2, 4)
        >>> student = jnp.concatenate([teacher[:, 0], teacher[:, 1]], axis=-1)[:, None]  # the same in one head
        >>> print(attention_relation_distillation(student, teacher, relation_heads=4))
        0.0

    References:
        Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
        Transformers", arXiv 2002.10957, equations 6 and 7, for the relations of values; Wang et al., "MiniLMv2:
        Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers", arXiv 2012.15828,
        section 3.1, for those of queries and keys and for relation heads. Call it once for each of the three. The
        handling of padding is our choice.
    """
    caller = "attention_relation_distillation"
    require_arrays(
        caller,
        {
            "student_vectors": (student_vectors, "float b hs l ds"),
            "teacher_vectors": (teacher_vectors, "float b ht l dt"),
            "token_mask": (token_mask, "bool b l"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    require_range(caller, "relation_heads", relation_heads, at_least=1)
    for name, vectors in (("student_vectors", student_vectors), ("teacher_vectors", teacher_vectors)):
        _, heads, _, width = vectors.shape
        if heads * width % relation_heads:
            raise InputError(
                f"{caller}: expected relation_heads to divide the {heads} x {width} = {heads * width} features of "
                f"{name} {list(vectors.shape)}, got {relation_heads}"
            )
    rows, _, length, _ = student_vectors.shape
    counting = counting_tokens((rows, length), token_mask, where)

    logits = [
        _relation_logits(mask_vectors(_relation_heads(vectors, relation_heads), counting[:, None]), counting)
        for vectors in same_precision(student_vectors, jax.lax.stop_gradient(teacher_vectors), where=None)
    ]
    losses = mean_over_tokens(jnp.mean(_divergence(*logits), axis=1), counting)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _token_axes(logits: Array) -> str:
    """Names for the axes between the first and the last; one axis is called l."""
    number = max(getattr(logits, "ndim", 0) - 2, 0)
    return "l" if number == 1 else " ".join(f"l{i + 1}" for i in range(number))


def _divergence(student: Float[Array, "*b v"], teacher: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    """KL(softmax(teacher) || softmax(student)) over the last axis.

    With p and q the two distributions and d = log p - log q it is `sum p (d + exp(-d) - 1)`, because `sum p exp(-d)` is
    1: no term is negative, where the terms of `sum p d` cancel and leave rounding as q approaches p.
    """
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
    p = jnp.exp(log_p)
    # Of what the teacher excludes only exp(-d) p = q is left.
    is_present = p > jnp.finfo(p.dtype).tiny
    d = jnp.where(is_present, log_p - log_q, jnp.zeros_like(p))
    return jnp.sum(jnp.where(is_present, p * (d + jnp.expm1(-d)), jnp.exp(log_q)), axis=-1)


def _relation_heads(vectors: Float[Array, "b h l d"], relation_heads: int) -> Float[Array, "b r l e"]:
    """The features of all heads of a token side by side, cut into as many parts."""
    rows, heads, length, width = vectors.shape
    tokens = jnp.swapaxes(vectors, 1, 2).reshape(rows, length, relation_heads, heads * width // relation_heads)
    return jnp.swapaxes(tokens, 1, 2)


def _relation_logits(vectors: Float[Array, "b r l e"], counting: Bool[Array, "b l"]) -> Float[Array, "b r l l"]:
    """Scaled inner products of all tokens, the lowest number where the key does not count."""
    logits = jnp.einsum("brie,brje->brij", vectors, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(counting[:, None, None, :], logits / math.sqrt(vectors.shape[-1]), jnp.finfo(logits.dtype).min)

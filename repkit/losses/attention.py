"""Attention maps of a student compared with those of a teacher that has another number of heads.

Alignment (AMAD) compares each teacher head with the mixture of student heads that are most like it. The other losses
are the baselines that it is measured against; they match heads by their numbers or by learned or given mixtures.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.checks import InputError, require_arrays, require_choice, require_range
from repkit.losses._attention_blocks import Maps, Masks, QueriesKeys, Settings, Source, blockwise_alignment
from repkit.losses._attention_plain import (
    AlignmentGradient,
    Divergence,
    aligned_divergence,
    attention_maps,
    counting_cells,
    flatten_cells,
    has_cells,
    head_divergences,
    normalized,
    token_rows,
)
from repkit.losses.form import Blocks, Form, require_form
from repkit.numerics import AxisName, Reduction, Scalar, reduce_loss, same_precision, target_platform

AlignmentVariant: TypeAlias = Literal["mse", "kl", "token_kl"]
MapVariant: TypeAlias = Literal["mse", "kl", "projected_kl", "token_kl"]


class MapProjection(NamedTuple):
    """The learned projection of variant "projected_kl", for maps of n = q * k cells.

    Attributes:
        weight: W [n n].
        bias: b [n].
    """

    weight: Float[Array, "n n"]
    bias: Float[Array, " n"]


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


def attention_map_alignment(
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    *,
    variant: MapVariant = "kl",
    temperature: Scalar = 1.0,
    alignment_gradient: AlignmentGradient = "through",
    projection: MapProjection | None = None,
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of each teacher head from the mixture of student heads that resemble it (AMAD).

    With an example's flattened heads, teacher t_i and student s_j, and `a_ij = softmax_j(cos(t_i, s_j) / temperature)`:

        "mse"           sum_i | t_i / |t_i|_2 - sum_j a_ij s_j / |s_j|_2 |^2
        "kl"            sum_i KL(p_i || sum_j a_ij r_j), p_i = t_i / |t_i|_1, r_j = s_j / |s_j|_1
        "projected_kl"  "kl" with relu(W s_j + b) in the place of s_j
        "token_kl"      the sum over query rows of "kl" on the row's k cells, with weights a of its own

    The mean over examples is taken; for several layers take the mean of their losses. An empty head, whose cells that
    count have a Euclidean length under 1e-6, is left out, and an example without heads has loss 0 and a zero gradient.

    Args:
        student_maps: attention maps, after the softmax [b hs q k]; cells >= 0 and at most about 1, of any float dtype.
        teacher_maps: the teacher's [b ht q k]; no gradient flows to it. hs and ht may differ either way.
        variant: the divergence, as above. "projected_kl" suits small fixed q and k only, since W is [q k, q k].
        temperature: > 0; towards 0 every teacher head is compared with the one student head most like it.
        alignment_gradient: "through" lets the gradient flow through the weights a; "stopped" holds them fixed.
        projection: W and b, for "projected_kl" and only for it; gradients flow to both.
        query_where: [b q]; False leaves a query's row out of both maps, whatever it holds.
        key_where: [b k]; False leaves a key's column out.
        form: `Blocks()` walks example by example and gives gradients only; its `size` is the query rows of a block, by
            default all of them unless the maps are very large. Without a size, "mse" and "kl" are a kernel on a TPU
            where an example's maps fit into a core and the arrays are one device's: inside `shard_map`, as by
            `over_mesh`, or where there is one device. "plain" is the formula in JAX's own operations.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32.

    Raises:
        InputError: shapes that do not fit together, an unknown name, a temperature <= 0, or a projection that is
            missing or not used.

    Example:
        >>> maps = jnp.eye(3).reshape(1, 3, 1, 3)  # three heads, one query that looks at one key in each
        >>> print(f"{attention_map_alignment(maps, maps):.4f}")  # -3 log a_ii, a_ii = e / (e + 2)
        1.6543
        >>> print(f"{attention_map_alignment(maps, maps, temperature=0.01):.4f}")
        0.0000

    References:
        Zhao et al., "No Head Left Behind: Multi-Head Alignment Distillation for Transformers", AAAI 2024,
        doi 10.1609/aaai.v38i7.28583: the four variants, temperature 1 and the sum over teacher heads. Ours: that the
        weights of "kl" come from cosines while its mixture is of L1-normalised maps (L1-normalised rows in the softmax
        would make the weights uniform), `alignment_gradient`, masks, and means over examples and layers.
    """
    caller = "attention_map_alignment"
    require_choice("variant", variant, get_args(MapVariant))
    _require_maps(caller, student_maps, teacher_maps, query_where, key_where, where, weights)
    _require_options(caller, temperature, alignment_gradient, form)
    if (projection is not None) != (variant == "projected_kl"):
        raise InputError(
            f'{caller}: expected a projection for variant="projected_kl" and for no other, '
            f"got {'none' if projection is None else 'one'} for variant={variant!r}"
        )
    if projection is not None:
        student_maps = _projected(caller, student_maps, projection, query_where, key_where, where)
    kind = "kl" if variant == "projected_kl" else variant
    losses = _aligned(
        Settings(kind, alignment_gradient, False, form.size if isinstance(form, Blocks) else None),
        Maps(student_maps),
        Maps(jax.lax.stop_gradient(teacher_maps)),
        _masks(student_maps.shape[0], student_maps.shape[2], query_where, key_where, where),
        temperature,
        form,
    )
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def attention_alignment_from_queries_keys(
    student_query: Float[Array, "b hs q ds"],
    student_key: Float[Array, "b hs k ds"],
    teacher_query: Float[Array, "b ht q dt"],
    teacher_key: Float[Array, "b ht k dt"],
    *,
    variant: AlignmentVariant = "kl",
    temperature: Scalar = 1.0,
    alignment_gradient: AlignmentGradient = "through",
    visible: Literal["all", "causal"] = "all",
    student_logit_scale: Scalar | None = None,
    teacher_logit_scale: Scalar | None = None,
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    form: Form = Blocks(),
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """`attention_map_alignment` of maps that are never held: they are computed in blocks of rows from queries and keys.

        maps = softmax over keys of logit_scale <query, key>, for student and teacher

    Made for models whose attention is computed without maps, and for long sequences: memory of queries and keys, at the
    price of computing the maps anew two or three times.

    Args:
        student_query: [b hs q ds], as they enter the inner product, that is, after any rotation.
        student_key: [b hs k ds]; k differs from q for cross-attention.
        teacher_query: [b ht q dt]; no gradient flows to it. Heads and dimensions may differ from the student's.
        teacher_key: [b ht k dt].
        variant: the divergence; see `attention_map_alignment`.
        temperature: of the weights, > 0.
        alignment_gradient: "through" lets the gradient flow through the weights a; "stopped" holds them fixed.
        visible: which keys a query sees: "all", or "causal" for those at its own position and before.
        student_logit_scale: the factor of the student's inner products; None for 1 / sqrt(ds).
        teacher_logit_scale: the teacher's; None for 1 / sqrt(dt).
        query_where: [b q]; False leaves a query out.
        key_where: [b k]; False removes a key before the softmax.
        form: `Blocks()` gives gradients only; its `size` is the query rows of a block. "plain" holds all maps.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; 0 with zero gradient where nothing counts.

    Raises:
        InputError: shapes that do not fit together, an unknown name, or a temperature <= 0.

    Example:
        >>> query, key = jnp.eye(2).reshape(1, 1, 2, 2), jnp.eye(2).reshape(1, 1, 2, 2)
        >>> print(attention_alignment_from_queries_keys(query, key, query, key))
        0.0

    References:
        Zhao et al., AAAI 2024, doi 10.1609/aaai.v38i7.28583, of which this is another way to compute the same value.
    """
    caller = "attention_alignment_from_queries_keys"
    require_choice("variant", variant, get_args(AlignmentVariant))
    require_choice("visible", visible, ["all", "causal"])
    require_arrays(
        caller,
        {
            "student_query": (student_query, "float b hs q ds"),
            "student_key": (student_key, "float b hs k ds"),
            "teacher_query": (teacher_query, "float b ht q dt"),
            "teacher_key": (teacher_key, "float b ht k dt"),
            "query_where": (query_where, "bool b q"),
            "key_where": (key_where, "bool b k"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )
    _require_options(caller, temperature, alignment_gradient, form)

    def scaled(query: Array, key: Array, scale: Scalar | None) -> QueriesKeys:
        query, key = same_precision(query, key, where=where)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else jnp.asarray(scale, query.dtype)
        return QueriesKeys(query * scale, key)

    losses = _aligned(
        Settings(variant, alignment_gradient, visible == "causal", form.size if isinstance(form, Blocks) else None),
        scaled(student_query, student_key, student_logit_scale),
        jax.lax.stop_gradient(scaled(teacher_query, teacher_key, teacher_logit_scale)),
        _masks(student_query.shape[0], student_query.shape[2], query_where, key_where, where),
        temperature,
        form,
    )
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _require_maps(caller: str, student: Any, teacher: Any, query_where: Any, key_where: Any, *rows: Any) -> None:
    where, weights = rows
    require_arrays(
        caller,
        {
            "student_maps": (student, "float b hs q k"),
            "teacher_maps": (teacher, "float b ht q k"),
            "query_where": (query_where, "bool b q"),
            "key_where": (key_where, "bool b k"),
            "where": (where, "bool b"),
            "weights": (weights, "float b"),
        },
    )


def _require_options(caller: str, temperature: Scalar, alignment_gradient: str, form: Form) -> None:
    require_range(caller, "temperature", temperature, above=0)
    require_choice("alignment_gradient", alignment_gradient, get_args(AlignmentGradient))
    require_form(caller, form)


def _masks(
    examples: int,
    queries: int,
    query_where: Bool[Array, "b q"] | None,
    key_where: Bool[Array, "b k"] | None,
    where: Bool[Array, " b"] | None,
) -> Masks:
    """Which queries and keys count; none of a masked example, so that what it holds is never read."""
    if where is not None:
        of_example = jnp.broadcast_to(where[:, None], (examples, queries))
        query_where = of_example if query_where is None else query_where & of_example
    return Masks(query_where, key_where)


def _aligned(
    settings: Settings, student: Source, teacher: Source, masks: Masks, temperature: Scalar, form: Form
) -> Float[Array, " b"]:
    """The losses of the examples, in the form asked for."""
    if form == "plain":
        return _plainly_aligned(settings, student, teacher, masks, temperature)
    if isinstance(student, Maps) and isinstance(teacher, Maps) and target_platform() == "tpu":
        from repkit.losses import _attention_kernel as kernel  # of use on TPUs alone, and slow to import

        if kernel.covers(settings, student.maps, teacher.maps):
            return kernel.kernel_alignment(settings, student.maps, teacher.maps, masks, jnp.asarray(temperature))
    if isinstance(student, QueriesKeys):
        queries, keys = student.query.shape[-2], student.key.shape[-2]
    else:
        queries, keys = student.maps.shape[-2:]
        student, teacher = (jax.tree.map(flatten_cells, source) for source in (student, teacher))
    return blockwise_alignment(settings, student, teacher, masks, jnp.asarray(temperature), queries=queries, keys=keys)


def _plainly_aligned(
    settings: Settings, student: Source, teacher: Source, masks: Masks, temperature: Scalar
) -> Float[Array, " b"]:
    counting = counting_cells(masks.query, masks.key)

    def maps(source: Source) -> Float[Array, "b h q k"]:
        match source:
            case Maps(maps):
                return maps if counting is None else jnp.where(counting, maps, 0.0)
            case QueriesKeys(query, key):
                allowed = counting
                if settings.causal:
                    earlier = jnp.tril(jnp.ones((query.shape[-2], key.shape[-2]), bool))[None, None]
                    allowed = earlier if allowed is None else allowed & earlier
                query, key = (
                    x if counts is None else jnp.where(counts[:, None, :, None], x, 0.0)
                    for x, counts in ((query, masks.query), (key, masks.key))
                )
                return attention_maps(query, key, allowed)

    kind, heads = ("kl", token_rows) if settings.kind == "token_kl" else (settings.kind, flatten_cells)
    student_heads, teacher_heads = map(heads, same_precision(maps(student), maps(teacher), where=None))
    losses = aligned_divergence(
        student_heads,
        teacher_heads,
        kind=kind,
        temperature=jnp.asarray(temperature, student_heads.dtype).reshape((1,) * student_heads.ndim),
        alignment_gradient=settings.alignment_gradient,
    )
    return losses if losses.ndim == 1 else jnp.sum(losses, axis=-1)


def _projected(
    caller: str,
    maps: Float[Array, "b h q k"],
    projection: MapProjection,
    query_where: Bool[Array, "b q"] | None,
    key_where: Bool[Array, "b k"] | None,
    where: Bool[Array, " b"] | None,
) -> Float[Array, "b h q k"]:
    """`relu(W s + b)` of the cells that count."""
    weight, bias = projection
    cells = maps.shape[2] * maps.shape[3]
    require_arrays(caller, {"projection.weight": (weight, "float n n"), "projection.bias": (bias, "float n")})
    if bias.shape[0] != cells:
        raise InputError(f"{caller}: expected a projection of n = q k = {cells} cells, got one of {bias.shape[0]}")
    counting = counting_cells(_masks(maps.shape[0], maps.shape[2], query_where, None, where).query, key_where)
    flat = flatten_cells(maps if counting is None else jnp.where(counting, maps, 0.0))
    flat, weight, bias = same_precision(flat, weight, bias, where=None)
    return jax.nn.relu(jnp.matmul(flat, weight.T, precision=jax.lax.Precision.HIGHEST) + bias[None, None]).reshape(
        maps.shape
    )


# ---------------------------------------------------------------------------------------------------------------------
# Baselines: heads matched in other ways


def one_to_one_attention(
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    *,
    variant: Divergence = "kl",
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of each teacher head from the student head of its number; surplus heads of either side are dropped.

    With an example's flattened heads t_i, s_i, in the norms of `attention_map_alignment`:

        "mse"   sum_i | t_i / |t_i|_2 - s_i / |s_i|_2 |^2
        "kl"    sum_i KL(t_i / |t_i|_1 || s_i / |s_i|_1)

    Args:
        student_maps: attention maps, after the softmax [b hs q k]; cells >= 0.
        teacher_maps: the teacher's [b ht q k]; no gradient flows to it.
        variant: the divergence, as above.
        query_where: [b q]; False leaves a query's row out of both maps, whatever it holds.
        key_where: [b k]; False leaves a key's column out.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32; a pair of heads of which one is empty counts 0.

    Raises:
        InputError: shapes that do not fit together, or an unknown name.

    Example:
        >>> maps = jnp.eye(3).reshape(1, 3, 1, 3)
        >>> print(one_to_one_attention(maps[:, :2], maps, variant="mse"))
        0.0
        >>> print(one_to_one_attention(maps[:, 1:], maps, variant="mse"))
        4.0

    References:
        The baseline of Zhao et al., AAAI 2024, doi 10.1609/aaai.v38i7.28583; the norms are those of its alignment.
    """
    caller = "one_to_one_attention"
    student, teacher = _head_pair(caller, variant, student_maps, teacher_maps, query_where, key_where, where, weights)
    heads = min(student.shape[1], teacher.shape[1])
    losses = _matched_losses(student[:, :heads], teacher[:, :heads], variant)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def mean_head_attention(
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    *,
    variant: Divergence = "kl",
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of the mean of the teacher's heads from the mean of the student's.

    It is `one_to_one_attention` of the two means, each one head.

    Args:
        student_maps: attention maps, after the softmax [b hs q k]; cells >= 0.
        teacher_maps: the teacher's [b ht q k]; no gradient flows to it.
        variant: the divergence, "mse" or "kl", of `one_to_one_attention`.
        query_where: [b q]; False leaves a query's row out of both maps, whatever it holds.
        key_where: [b k]; False leaves a key's column out.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32.

    Raises:
        InputError: shapes that do not fit together, or an unknown name.

    Example:
        >>> maps = jnp.eye(2).reshape(1, 2, 1, 2)
        >>> print(f"{mean_head_attention(maps, maps[:, ::-1], variant='mse'):.1f}")
        0.0

    References:
        A baseline of ours for alignment: what is left when heads are not told apart.
    """
    caller = "mean_head_attention"
    student, teacher = _head_pair(caller, variant, student_maps, teacher_maps, query_where, key_where, where, weights)
    student, teacher = (jnp.mean(maps, axis=1, keepdims=True) for maps in (student, teacher))
    losses = _matched_losses(student, teacher, variant)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def mixed_head_attention(
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    *,
    mixer: Float[Array, "ht hs"],
    variant: Divergence = "kl",
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of each teacher head from a learned mixture of student heads, the same for all examples (A2D).

        m_i = relu(sum_j mixer_ij s_j), compared with t_i as in `one_to_one_attention`

    Args:
        student_maps: attention maps, after the softmax [b hs q k]; cells >= 0.
        teacher_maps: the teacher's [b ht q k]; no gradient flows to it.
        mixer: a learned 1 x 1 convolution over heads [ht hs]; a gradient flows to it. Begin with positive entries.
        variant: the divergence, "mse" or "kl", of `one_to_one_attention`.
        query_where: [b q]; False leaves a query's row out of both maps, whatever it holds.
        key_where: [b k]; False leaves a key's column out.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32.

    Raises:
        InputError: shapes that do not fit together, or an unknown name.

    Example:
        >>> maps = jnp.eye(2).reshape(1, 2, 1, 2)
        >>> print(mixed_head_attention(maps, maps[:, ::-1], mixer=jnp.eye(2)[::-1], variant="mse"))
        0.0

    References:
        Jin et al., "Align-to-Distill: Trainable Attention Alignment for Knowledge Distillation in Neural Machine
        Translation", arXiv 2403.01479, for the mixer. Ours: the relu, which keeps mixtures >= 0, and the norms.
    """
    caller = "mixed_head_attention"
    student, teacher = _head_pair(caller, variant, student_maps, teacher_maps, query_where, key_where, where, weights)
    mixed = jax.nn.relu(_mixture(caller, "mixer", mixer, student, teacher.shape[1]))
    losses = _matched_losses(mixed, teacher, variant)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def merged_head_attention(
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    *,
    merging: Float[Array, "hs ht"] | None = None,
    variant: Divergence = "kl",
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    where: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
    axis_name: AxisName | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""] | Float[Array, " b"]:
    """Divergence of teacher heads, merged to as many as the student has, from the student's heads (SHD).

        u_j = sum_i merging_ji t_i, compared with s_j as in `one_to_one_attention`

    Args:
        student_maps: attention maps, after the softmax [b hs q k]; cells >= 0.
        teacher_maps: the teacher's [b ht q k]; no gradient flows to it.
        merging: shares >= 0 of the teacher's heads in each merged one [hs ht]; their scale does not matter. None
            divides the teacher's heads evenly among the student's, neighbours together.
        variant: the divergence, "mse" or "kl", of `one_to_one_attention`.
        query_where: [b q]; False leaves a query's row out of both maps, whatever it holds.
        key_where: [b k]; False leaves a key's column out.
        where: [b]; False removes the example.
        weights: [b], >= 0; the example's share of the mean.
        axis_name: the axis of `pmap` or `shard_map` that the examples are split over; None when the arrays are global.
        reduction: "mean", "sum" or "none" for [b]; see `repkit.numerics.reduce_loss`.

    Returns:
        The loss, at least float32.

    Raises:
        InputError: shapes that do not fit together, or an unknown name.

    Example:
        >>> maps = jnp.eye(4).reshape(1, 4, 1, 4)
        >>> merged = (maps[:, 0::2] + maps[:, 1::2]) / 2
        >>> print(f"{merged_head_attention(merged, maps, variant='mse'):.1f}")
        0.0

    References:
        "Squeezing-Heads Distillation", arXiv 2502.07436, for convex merging of teacher heads. Its choice of the shares
        is not reproduced: the even division is ours, and other shares can be passed in.
    """
    caller = "merged_head_attention"
    student, teacher = _head_pair(caller, variant, student_maps, teacher_maps, query_where, key_where, where, weights)
    if merging is None:
        merging = _even_shares(student.shape[1], teacher.shape[1], teacher.dtype)
    losses = _matched_losses(student, _mixture(caller, "merging", merging, teacher, student.shape[1]), variant)
    return reduce_loss(losses, where=where, weights=weights, axis_name=axis_name, reduction=reduction)


def _head_pair(
    caller: str,
    variant: str,
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    query_where: Bool[Array, "b q"] | None,
    key_where: Bool[Array, "b k"] | None,
    *rows: Any,
) -> list[Float[Array, "b h n"]]:
    """Flattened maps, 0 where they do not count."""
    require_choice("variant", variant, get_args(Divergence))
    _require_maps(caller, student_maps, teacher_maps, query_where, key_where, *rows)
    where, _ = rows
    pair = same_precision(student_maps, jax.lax.stop_gradient(teacher_maps), where=where)
    counting = counting_cells(query_where, key_where)
    return [flatten_cells(maps if counting is None else jnp.where(counting, maps, 0.0)) for maps in pair]


def _matched_losses(
    student: Float[Array, "b h n"], teacher: Float[Array, "b h n"], variant: Divergence
) -> Float[Array, " b"]:
    """The divergences of heads of the same number, summed over heads; 0 where the student's is empty."""
    has_student = has_cells(jnp.sum(jnp.square(student), axis=-1, keepdims=True))
    teacher = jnp.where(has_student, normalized(teacher, variant), 0.0)
    return jnp.sum(head_divergences(normalized(student, variant), teacher, variant), axis=-1)


def _mixture(
    caller: str, name: str, shares: Float[Array, "o i"], heads: Float[Array, "b i n"], mixtures: int
) -> Float[Array, "b o n"]:
    require_arrays(caller, {name: (shares, "float o i")})
    if shares.shape != (mixtures, heads.shape[1]):
        raise InputError(f"{caller}: expected {name} of shape [{mixtures}, {heads.shape[1]}], got {list(shares.shape)}")
    return jnp.einsum("oi,bin->bon", shares.astype(heads.dtype), heads, precision=jax.lax.Precision.HIGHEST)


def _even_shares(parts: int, heads: int, dtype: jnp.dtype) -> Float[Array, "p h"]:
    """How much of each of `heads` unit intervals lies in each of `parts` equal parts of them all."""
    ends = jnp.arange(parts + 1, dtype=dtype) * (heads / parts)
    starts = jnp.arange(heads, dtype=dtype)
    overlap = jnp.minimum(starts + 1, ends[1:, None]) - jnp.maximum(starts, ends[:-1, None])
    return jnp.maximum(overlap, 0.0)

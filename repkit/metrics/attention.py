"""How attention heads of two models resemble one another."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from repkit.checks import require_arrays
from repkit.numerics import mask_rows, normalize


def head_cosines(
    student_maps: Float[Array, "b hs q k"],
    teacher_maps: Float[Array, "b ht q k"],
    *,
    query_where: Bool[Array, "b q"] | None = None,
    key_where: Bool[Array, "b k"] | None = None,
    where: Bool[Array, " b"] | None = None,
) -> Float[Array, "ht hs"]:
    """Cosine between each head of a teacher and each head of a student, the mean over examples.

        cos_ij = mean_b <t_bi, s_bj> / (|t_bi| |s_bj|),        maps flattened over their cells

    Args:
        student_maps: attention maps, after the softmax [b hs q k].
        teacher_maps: the teacher's [b ht q k].
        query_where: [b q]; False leaves a query's row out, as padding.
        key_where: [b k]; False leaves a key's column out.
        where: [b]; False leaves the example out.

    Returns:
        [ht hs], in [0, 1] because maps are not negative; 0 without examples.

    Raises:
        InputError: shapes that do not fit together.

    Example:
        >>> maps = jnp.eye(2).reshape(1, 2, 1, 2)
        >>> head_cosines(maps[:, :1], maps)
        Array([[1.],
               [0.]], dtype=float32)

    References:
        The similarity by which Zhao et al., AAAI 2024, doi 10.1609/aaai.v38i7.28583, weigh student heads.
    """
    require_arrays(
        "head_cosines",
        {
            "student_maps": (student_maps, "float b hs q k"),
            "teacher_maps": (teacher_maps, "float b ht q k"),
            "query_where": (query_where, "bool b q"),
            "key_where": (key_where, "bool b k"),
            "where": (where, "bool b"),
        },
    )

    def heads(maps: Float[Array, "b h q k"]) -> Float[Array, "b h n"]:
        if query_where is not None:
            maps = jnp.where(query_where[:, None, :, None], maps, 0.0)
        if key_where is not None:
            maps = jnp.where(key_where[:, None, None, :], maps, 0.0)
        return normalize(mask_rows(maps, where).reshape(*maps.shape[:2], -1))

    cosines = jnp.einsum("bin,bjn->bij", heads(teacher_maps), heads(student_maps))
    count = len(cosines) if where is None else jnp.maximum(jnp.sum(where), 1)
    return jnp.sum(cosines, axis=0) / count

"""What a loss costs, value and gradient: operations of its matrix products, and elements that it reads and writes.

b rows of width d. docs/losses.md lists the same formulas.
"""


def pair_flops(b: int, d: int, *, products: int) -> float:
    """So many products of [b d] with [d b], or of as much work, which a loss over all pairs makes.

    Plain InfoNCE: 3, the scores and the gradients of both sides. In blocks: 4, as the scores are made twice. Uniformity
    of two modalities: 6 plain, 3 in blocks that use the symmetry.
    """
    return 2.0 * products * b**2 * d


def gram_flops(b: int, d: int, *, products: int) -> float:
    """So many products of [d b] with [b d], or of as much work. Geometric consistency with equal weights: 4."""
    return 2.0 * products * b * d**2


def pair_traffic(b: int, d: int) -> float:
    """Both sides are read for the value and for the gradient, and both gradients are written."""
    return 6.0 * b * d


def elementwise_traffic(b: int, d: int, *, arrays: int) -> float:
    """Every array is read once, and its gradient written."""
    return 2.0 * arrays * b * d


def attention_map_flops(b: int, teacher_heads: int, student_heads: int, cells: int) -> float:
    """Five products over the cells of all head pairs: cosines and mixture, and the three of their gradients."""
    return 10.0 * b * teacher_heads * student_heads * cells


def attention_map_traffic(b: int, teacher_heads: int, student_heads: int, cells: int) -> float:
    """Both models' maps are read, and the gradient of the student's is written."""
    return float(b * (teacher_heads + 2 * student_heads) * cells)


def plain_queries_keys_flops(b: int, teacher_heads: int, student_heads: int, length: int, width: int) -> float:
    """With all maps in memory: the maps, what the maps cost, and the gradients of queries and keys."""
    maps = 2.0 * b * length**2 * width * (teacher_heads + 3 * student_heads)
    return maps + attention_map_flops(b, teacher_heads, student_heads, length**2)


def queries_keys_flops(b: int, teacher_heads: int, student_heads: int, length: int, width: int) -> float:
    """With the maps of both models computed twice, in blocks of queries."""
    per_cell = (
        4 * width * (teacher_heads + student_heads)
        + 4 * width * student_heads
        + 8 * teacher_heads * student_heads
        + 2 * student_heads**2
    )
    return float(b * length**2 * per_cell)


def queries_keys_traffic(b: int, teacher_heads: int, student_heads: int, length: int, width: int) -> float:
    """Queries and keys are read, and the gradients of the student's are written."""
    return float(2 * b * (teacher_heads + 2 * student_heads) * length * width)

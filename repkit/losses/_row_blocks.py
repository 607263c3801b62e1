"""Walking the rows of an array in blocks of one size, without copying the array."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class RowBlocks(NamedTuple):
    """`blocks` blocks of `rows` rows that cover `total` rows.

    Where their number divides the total, block i holds the rows i, i + blocks, i + 2 blocks, and so on: under `jit`
    with rows split over devices each device then finds its share of every block among its own rows. Otherwise blocks
    are contiguous, and the last begins early enough to be full: it repeats rows of the one before.
    """

    total: int
    rows: int
    blocks: int

    @classmethod
    def of(cls, total: int, size: int) -> "RowBlocks":
        """Blocks of at most `size` rows, and of not less than half of it unless the total is smaller."""
        fewest = -(-total // min(size, total))
        count = next((count for count in range(fewest, 2 * fewest) if total % count == 0), fewest)
        return cls(total, -(-total // count), count)

    @property
    def is_even(self) -> bool:
        """Whether no row is in two blocks."""
        return self.rows * self.blocks == self.total

    def take(self, x: Shaped[Array, " b *shape"], i: Int[Array, ""]) -> Shaped[Array, " r *shape"]:
        """The rows of block i."""
        if self.is_even:
            split = x.reshape(self.rows, self.blocks, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(split, i, axis=1, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(x, self._start(i), self.rows)

    def put(
        self, x: Shaped[Array, " b *shape"], block: Shaped[Array, " r *shape"], i: Int[Array, ""]
    ) -> Shaped[Array, " b *shape"]:
        """`x` with the rows of block i replaced."""
        if self.is_even:
            split = x.reshape(self.rows, self.blocks, *x.shape[1:])
            return jax.lax.dynamic_update_index_in_dim(split, block, i, axis=1).reshape(x.shape)
        return jax.lax.dynamic_update_slice_in_dim(x, block, self._start(i), axis=0)

    def places(self, i: Int[Array, ""]) -> Int[Array, " r"]:
        """Where the rows of block i lie in the array."""
        return i + self.blocks * jnp.arange(self.rows) if self.is_even else self._start(i) + jnp.arange(self.rows)

    def is_new(self, i: Int[Array, ""]) -> Bool[Array, " r"]:
        """Which rows of block i are in no earlier block."""
        if self.is_even:
            return jnp.ones(self.rows, bool)
        return self.places(i) >= i * self.rows

    def _start(self, i: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(i * self.rows, self.total - self.rows)

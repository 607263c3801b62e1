"""Walking the rows of an array in blocks of one size, without copying the array."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class RowBlocks(NamedTuple):
    """`blocks` blocks of `rows` rows that cover `total` rows.

    Interleaved, block i holds the rows i, i + blocks, i + 2 blocks, and so on: under `jit`, with rows split over
    devices, each device then finds its share of every block among its own rows. Otherwise a block's rows follow one
    another, and where blocks do not divide the total the last begins early enough to be full: it repeats rows of the
    one before.
    """

    total: int
    rows: int
    blocks: int
    is_interleaved: bool

    @classmethod
    def contiguous(cls, total: int, size: int) -> "RowBlocks":
        """As few blocks of at most `size` rows as there can be, and all nearly equal parts."""
        blocks = -(-total // min(size, total))
        return cls(total, -(-total // blocks), blocks, False)

    @classmethod
    def interleaved(cls, total: int, size: int) -> "RowBlocks":
        """Blocks of at most `size` rows, interleaved if a number of blocks up to twice the least divides the total."""
        fewest = cls.contiguous(total, size)
        blocks = next((blocks for blocks in range(fewest.blocks, 2 * fewest.blocks) if total % blocks == 0), None)
        return fewest if blocks is None else cls(total, total // blocks, blocks, True)

    @property
    def repeats(self) -> bool:
        """Whether some rows are in two blocks."""
        return self.rows * self.blocks > self.total

    def take(self, x: Shaped[Array, " b *shape"], i: Int[Array, ""] | int) -> Shaped[Array, " r *shape"]:
        """The rows of block i."""
        if self.is_interleaved:
            split = x.reshape(self.rows, self.blocks, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(split, i, axis=1, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(x, self._start(i), self.rows)

    def put(
        self, x: Shaped[Array, " b *shape"], block: Shaped[Array, " r *shape"], i: Int[Array, ""] | int
    ) -> Shaped[Array, " b *shape"]:
        """`x` with the rows of block i replaced."""
        if self.is_interleaved:
            split = x.reshape(self.rows, self.blocks, *x.shape[1:])
            return jax.lax.dynamic_update_index_in_dim(split, block, i, axis=1).reshape(x.shape)
        return jax.lax.dynamic_update_slice_in_dim(x, block, self._start(i), axis=0)

    def is_new(self, i: Int[Array, ""] | int) -> Bool[Array, " r"]:
        """Which rows of block i are in no earlier block."""
        if not self.repeats:
            return jnp.ones(self.rows, bool)
        return self._start(i) + jnp.arange(self.rows) >= i * self.rows

    def _start(self, i: Int[Array, ""] | int) -> Int[Array, ""]:
        return jnp.minimum(i * self.rows, self.total - self.rows)

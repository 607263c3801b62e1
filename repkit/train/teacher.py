"""Teachers that run in the training step: a model with fixed parameters, or the student's own moving average.

Both have the interface of `repkit.train.step.Teacher`. What a teacher says can also be kept on disk and ride in the
batches, see `repkit.train.teacher_cache`; the terms of an objective take it at the same paths, `teacher.<path>`.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from repkit.checks import InputError
from repkit.train.mesh import Rules
from repkit.train.state import TrainState
from repkit.train.step import Batch, Forward


@dataclass(frozen=True, eq=False)
class FrozenTeacher:
    """A trained model that stays as it is. It runs deterministically, in the student's step and on the student's rows.

    Its parameters are an argument of the compiled step beside the training state: copied to the devices once, by
    sharding rules of their own, neither trained nor donated nor saved with the student's checkpoints, which keep their
    `identity` instead.

    Attributes:
        forward: the teacher's `forward(params, batch, key) -> outputs`; it is called with the key None.
        params: its parameters, on the host or on a device.
        dtype: floating parameters are cast to it once, when they are placed; None leaves them. bfloat16 halves their
            memory; what the model computes in is the model's own affair.
        rules: how the parameters are sharded over a mesh, see `repkit.train.mesh.state_shardings`; with `pmap` every
            device holds them all.

    Raises:
        InputError: if `dtype` is no floating-point type.

    Example:
        >>> teacher = FrozenTeacher(lambda params, batch, key: {"logits": batch["x"] @ params["w"]}, {"w": np.eye(2)})
        >>> teacher.identity[:12]
        '3fec4ada757a'
    """

    forward: Forward
    params: Any
    dtype: DTypeLike | None = None
    rules: Rules = ()

    def __post_init__(self) -> None:
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise InputError(f"a teacher's dtype must be a floating-point type, got {jnp.dtype(self.dtype)}")

    @cached_property
    def identity(self) -> str:
        """`params_identity` of the parameters as they were given, before any cast."""
        return params_identity(self.params)

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters as they are placed."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self._dtype(leaf)), self.params)

    def put_params(self, shardings: Any) -> Any:
        """Casts and places the parameters.

        Args:
            shardings: a sharding for each of them.

        Returns:
            Copies: giving up the buffers of `params`, as a donated training state does, leaves them as they are.
        """

        def put(leaf: Any, sharding: Any) -> jax.Array:
            return jax.device_put(leaf.astype(self._dtype(leaf)), sharding, may_alias=False)

        return jax.tree.map(put, self.params, shardings)

    def outputs(self, params: Any, state: TrainState, batch: Batch) -> dict[str, Any]:
        """The teacher's outputs with the placed parameters."""
        return self.forward(params, batch, None)

    def _dtype(self, leaf: Any) -> np.dtype:
        is_cast = self.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.dtypes.canonicalize_dtype(self.dtype if is_cast else leaf.dtype)


@dataclass(frozen=True)
class MomentumTeacher:
    """The moving average of the student's parameters as its teacher; it runs deterministically.

    A step uses the average as it was before the step. It needs an update with `ema_decay`.

    Attributes:
        forward: the model, usually the student's own `forward`.
    """

    forward: Forward
    identity: None = field(default=None, init=False)
    rules: Rules = field(default=(), init=False)

    def abstract_params(self) -> tuple[()]:
        """None of its own: they are part of the training state."""
        return ()

    def put_params(self, shardings: Any) -> tuple[()]:
        """Nothing to place."""
        return ()

    def outputs(self, params: Any, state: TrainState, batch: Batch) -> dict[str, Any]:
        """The outputs of the model with the moving average.

        Raises:
            InputError: if the training state keeps none.
        """
        if state.ema is None:
            raise InputError("a momentum teacher is the moving average of the student, and none is kept: set ema_decay")
        return self.forward(state.ema, batch, None)


def params_identity(params: Any) -> str:
    """sha256 over the parameters: their paths, dtypes, shapes and every byte of their values.

    Args:
        params: a pytree of arrays, all of which this process can read.

    Returns:
        64 hexadecimal digits, the same on every machine and for parameters on the host or on any devices.

    Example:
        >>> params_identity({"w": jnp.ones(2)}) == params_identity({"w": np.ones(2, np.float32)})
        True
        >>> params_identity({"w": jnp.ones(2)}) == params_identity({"v": jnp.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

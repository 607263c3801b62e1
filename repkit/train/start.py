"""Training that starts from what another training has learned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from repkit.checks import InputError

_NAMED_AT_MOST = 5


def started_from(
    saved: Mapping[str, np.ndarray],
    init: Callable[[Array], Any],
    *,
    origin: str,
    replaced: Sequence[str] = (),
) -> Callable[[Array], Any]:
    """An `init` whose parameters are those of a trained model, wherever both models have the same part.

    A part is what stands at the top of the parameters, such as `image` or `class_head`. One that only one of the models
    has is new, or left out; one that both have must be the same in every leaf, so that no half of a tower starts anew
    unnoticed.

    Args:
        saved: the trained parameters by path, as `CheckpointReader.read` gives them; a leading `params/` or `ema/` is
            none of the path.
        init: from a key to new parameters.
        origin: where they come from, for messages.
        replaced: parts that are new where they differ, such as a head for other classes.

    Returns:
        From a key to parameters, as pure as `init`.

    Raises:
        InputError: the models have no part in common; or leaves of a common part differ, whose paths, shapes and dtypes
            the message names.

    Example:
        >>> saved = {"params/tower/w": np.ones(2, np.float32), "params/head/w": np.ones(3, np.float32)}
        >>> init = lambda key: {"tower": {"w": jnp.zeros(2)}, "head": {"w": jnp.zeros(5)}, "new": jnp.zeros(1)}
        >>> started_from(saved, init, origin="runs/first", replaced=["head"])(jax.random.key(0))["tower"]["w"].tolist()
        [1.0, 1.0]
        >>> started_from(saved, init, origin="runs/first")
        Traceback (most recent call last):
        repkit.checks.InputError: runs/first does not fit: head/w (there float32[3], here float32[5])
    """
    there = {path.removeprefix("params/").removeprefix("ema/"): leaf for path, leaf in saved.items()}
    here = _by_path(jax.eval_shape(init, jax.random.key(0)))
    common = {_part(path) for path in here} & {_part(path) for path in there}
    if not common:
        raise InputError(f"{origin} and the model have no part in common; there: {_names(there)}; here: {_names(here)}")
    different = [
        path
        for path in dict.fromkeys((*here, *there))
        if _part(path) in common and _kind(there.get(path)) != _kind(here.get(path))
    ]
    misfits = [path for path in different if _part(path) not in replaced]
    if misfits:
        shown = [f"{path} (there {_kind(there.get(path))}, here {_kind(here.get(path))})" for path in misfits]
        more = f" and {len(shown) - _NAMED_AT_MOST} more" if len(shown) > _NAMED_AT_MOST else ""
        raise InputError(f"{origin} does not fit: {', '.join(shown[:_NAMED_AT_MOST])}{more}")
    taken = {path: there[path] for path in here if _part(path) in common and path not in different}

    def started(key: Array) -> Any:
        new = init(key)
        leaves = [jnp.asarray(taken[path]) if path in taken else leaf for path, leaf in _by_path(new).items()]
        return jax.tree.unflatten(jax.tree.structure(new), leaves)

    return started


def _by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _part(path: str) -> str:
    return path.partition("/")[0]


def _names(paths: Mapping[str, Any]) -> str:
    return ", ".join(sorted({_part(path) for path in paths}))


def _kind(leaf: Any) -> str:
    return "none" if leaf is None else f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

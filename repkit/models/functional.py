"""Flax NNX modules as pure functions of a plain nested dict of parameters.

Training, checkpoints and sharding rules see `init`, `forward` and readable parameter paths, and nothing of Flax.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Key

from repkit.checks import InputError
from repkit.models.layers import Attention

Params = dict[str, Any]
"""Parameters as nested dicts of arrays; joined with "/", the keys read like `image/blocks/0/attention/query/kernel`."""

Batch = Mapping[str, Array]
Outputs = dict[str, Any]


class Model(NamedTuple):
    """A model as two pure functions, both fit for `jax.jit`, `jax.eval_shape` and `jax.grad`.

    Attributes:
        init: from a typed key to parameters. Under `jax.jit` with `out_shardings` they are made where they belong, and
            under `jax.eval_shape` not at all.
        forward: `forward(params, batch, key) -> outputs`; a key of None asks for the deterministic evaluation.
    """

    init: Callable[[Key[Array, ""]], Params]
    forward: Callable[[Params, Batch, Key[Array, ""] | None], Outputs]


def functional(build: Callable[[nnx.Rngs], nnx.Module], *, capture: Sequence[str] = ()) -> Model:
    """Makes pure functions of an NNX module; no weight is made on the way.

    Args:
        build: makes the module, for instance `lambda rngs: TwoTower(config, rngs=rngs)`. The module is called as
            `module(batch, key=key)`, returns a dict, and keeps no variables but parameters.
        capture: attention layers whose maps are wanted, as dotted paths in which `*` and `?` stand for any text, such
            as "text.blocks.*.attention"; see `attention_paths`.

    Returns:
        The model. With `capture`, its outputs hold `outputs["attention"][path]`, [b heads q k] float32, for each layer
        that matches and took part. Where a layer sees several views of an example, as consecutive rows or in several
        runs, the first counts. The other outputs are those of the model without `capture`, and no other map is kept.

    Raises:
        InputError: if a path matches no attention layer, or the module has variables that are not parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> class Scale(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.scale = nnx.Param(jax.random.uniform(rngs.params(), (2,)))
        ...     def __call__(self, batch, *, key=None):
        ...         return {"scaled": batch["x"] * self.scale}
        >>> model = functional(Scale)
        >>> jax.eval_shape(model.init, jax.random.key(0))
        {'scale': ShapeDtypeStruct(shape=(2,), dtype=float32)}
        >>> model.forward({"scale": jnp.array([1.0, 2.0])}, {"x": jnp.ones(2)}, None)
        {'scaled': Array([1., 2.], dtype=float32)}
    """
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    layers = dict(_attention_layers(module))
    captured = _matching(capture, tuple(layers))
    for path in captured:
        layers[path].capture_map = True
    structure, state = nnx.split(module)
    _require_only_parameters(state)

    def init(key: Key[Array, ""]) -> Params:
        return parameters(build(nnx.Rngs(key)))

    def forward(params: Params, batch: Batch, key: Key[Array, ""] | None) -> Outputs:
        module = nnx.merge(structure, nnx.restore_int_paths(params))
        if not captured:
            return module(batch, key=key)
        outputs, sown = nnx.capture(module, nnx.Intermediate)(batch, key=key)
        rows = len(next(iter(batch.values())))
        return outputs | {"attention": _attention_maps(sown, captured, rows)}

    return Model(init, forward)


def parameters(module: nnx.Module) -> Params:
    """The parameters of an NNX module, as the plain nested dict that `forward` takes.

    Example:
        >>> list(parameters(nnx.List([nnx.Linear(1, 2, rngs=nnx.Rngs(0))]))["0"])
        ['bias', 'kernel']
    """
    return _with_text_keys(nnx.to_pure_dict(nnx.state(module)))


def attention_paths(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[str, ...]:
    """The dotted paths of the attention layers that `functional(build, capture=...)` can capture.

    Example:
        >>> from repkit.models.encoders import TextConfig, TextTransformer
        >>> config = TextConfig(vocabulary_size=9, max_length=5, width=16, depth=2, heads=2)
        >>> attention_paths(lambda rngs: TextTransformer(config, rngs=rngs))
        ('blocks.0.attention', 'blocks.1.attention')
    """
    return tuple(path for path, _ in _attention_layers(nnx.eval_shape(lambda: build(nnx.Rngs(0)))))


def _attention_layers(module: nnx.Module) -> Iterator[tuple[str, Attention]]:
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, Attention):
            yield ".".join(map(str, path)), layer


def _matching(patterns: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=4, cutoff=0.0)
            raise InputError(
                f"capture path '{pattern}' matches no attention layer; "
                f"near ones: {', '.join(near) if near else 'none, the model has no attention layers'}"
            )
    return tuple(path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns))


def _attention_maps(sown: nnx.State, paths: Sequence[str], rows: int) -> dict[str, Float[Array, "b heads q k"]]:
    by_path = {".".join(map(str, path[:-1])): maps.get_value()[0] for path, maps in nnx.to_flat_state(sown)}
    views = {path: by_path[path].reshape(rows, -1, *by_path[path].shape[1:]) for path in paths if path in by_path}
    return {path: maps[:, 0] for path, maps in views.items()}


def _require_only_parameters(state: nnx.State) -> None:
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.Param):
            raise InputError(
                f"every variable of the model must be an nnx.Param, but {'.'.join(map(str, path))} is "
                f"{type(variable).__name__}; state does not pass through forward, and randomness comes from its key"
            )


def _with_text_keys(tree: Any) -> Any:
    """Layers in a list have numbers for keys; text sorts, prints and stores alike everywhere."""
    if isinstance(tree, dict):
        return {str(name): _with_text_keys(part) for name, part in tree.items()}
    return tree

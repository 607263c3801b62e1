"""Flax NNX modules as pure functions of a plain nested dict of parameters.

Training, checkpoints and sharding rules see `init`, `forward` and readable parameter paths, and nothing of Flax.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Key

from repkit.checks import InputError
from repkit.models.capture import NOTHING, Capture, attention_layers, captured_outputs, show, shown_by
from repkit.models.layers import Captured

Params = dict[str, Any]
"""Parameters as nested dicts of arrays; joined with "/", the keys read like `image/blocks/0/attention/query/kernel`."""

Batch = Mapping[str, Array]
Outputs = dict[str, Any]

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
ModelT = TypeVar("ModelT", bound=Any)


class Model(NamedTuple):
    """A model as two pure functions, both fit for `jax.jit`, `jax.eval_shape` and `jax.grad`.

    Attributes:
        init: from a typed key to parameters. Under `jax.jit` with `out_shardings` they are made where they belong, and
            under `jax.eval_shape` not at all.
        forward: `forward(params, batch, key) -> outputs`; a key of None asks for the deterministic evaluation.
    """

    init: Callable[[Key[Array, ""]], Params]
    forward: Callable[[Params, Batch, Key[Array, ""] | None], Outputs]


def functional(build: Callable[[nnx.Rngs], nnx.Module], *, capture: Capture = NOTHING) -> Model:
    """Makes pure functions of an NNX module; no weight is made on the way.

    Args:
        build: makes the module, for instance `lambda rngs: TwoTower(config, rngs=rngs)`. The module is called as
            `module(batch, key=key)`, returns a dict, and keeps no variables but parameters.
        capture: what its layers show beside the outputs; `attention_paths` lists the attention layers.

    Returns:
        The model. With `capture`, its outputs hold what was asked for, for each layer that matches and took part.
        Where a layer sees several views of an example, as consecutive rows or in several runs, the first counts. The
        other outputs are those of the model without `capture`, and nothing else is kept.

    Raises:
        InputError: if a path matches nothing, or the module has variables that are not parameters.

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
    wanted = show(module, capture)
    restore = _restorer(module)

    # Building a module of tracers takes a second for a few layers; jit remembers the trace for the next one who asks.
    @jax.jit
    def init(key: Key[Array, ""]) -> Params:
        return parameters(build(nnx.Rngs(key)))

    def forward(params: Params, batch: Batch, key: Key[Array, ""] | None) -> Outputs:
        module = restore(params)
        if not wanted:
            return module(batch, key=key)
        outputs, sown = nnx.capture(module, Captured)(batch, key=key)
        return outputs | captured_outputs(shown_by(sown), wanted, rows_of(batch))

    return Model(init, forward)


def restorer(build: Callable[[nnx.Rngs], ModuleT]) -> Callable[[Params], ModuleT]:
    """A function from parameters to the module that has them, for what `forward` does not do.

    Example:
        >>> restore = restorer(lambda rngs: nnx.Linear(1, 2, rngs=rngs))
        >>> restore({"kernel": jax.numpy.ones((1, 2)), "bias": jax.numpy.ones(2)})(jax.numpy.ones(1))
        Array([2., 2.], dtype=float32)
    """
    return _restorer(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def with_learned(model: ModelT, learned: Mapping[str, Callable[[Key[Array, ""]], Any]]) -> ModelT:
    """Gives a model parameters that a loss learns, such as a projection between hidden states.

    They are trained, sharded and saved with the others, as `params["learned"][name]`, and handed out as
    `outputs["learned"][name]`, so that a term takes them by path.

    Args:
        model: a `Model`, or another named tuple of `init`, `forward` and functions whose first argument is the
            parameters. The parameters are a dict.
        learned: from name to the function that makes the initial value of a typed key.

    Returns:
        The model with them. Its other parameters and outputs are as before, for the same key.

    Raises:
        InputError: when it runs, if the model learns something of one of these names already.

    Example:
        >>> import jax.numpy as jnp
        >>> double = Model(lambda key: {}, lambda params, batch, key: {"doubled": 2 * batch["x"]})
        >>> model = with_learned(double, {"projection": lambda key: jnp.eye(2)})
        >>> params = model.init(jax.random.key(0))
        >>> params["learned"]["projection"].shape
        (2, 2)
        >>> list(model.forward(params, {"x": jnp.ones(2)}, None))
        ['doubled', 'learned']
    """

    def init(key: Key[Array, ""]) -> Params:
        params = model.init(key)
        added = {name: make(jax.random.fold_in(key, zlib.crc32(name.encode()))) for name, make in learned.items()}
        return params | {"learned": _disjoint(params.get("learned", {}), added)}

    def own(params: Params) -> Params:
        others = {name: value for name, value in params["learned"].items() if name not in learned}
        rest = {name: value for name, value in params.items() if name != "learned"}
        return rest | {"learned": others} if others else rest

    def forward(params: Params, batch: Batch, key: Key[Array, ""] | None) -> Outputs:
        outputs = model.forward(own(params), batch, key)
        added = {name: params["learned"][name] for name in learned}
        return outputs | {"learned": _disjoint(outputs.get("learned", {}), added)}

    def of_own(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *arguments, **keywords: function(own(params), *arguments, **keywords)

    others = {name: of_own(getattr(model, name)) for name in model._fields if name not in ("init", "forward")}
    return model._replace(init=init, forward=forward, **others)


def rows_of(batch: Batch) -> int:
    """The number of examples in a batch."""
    return len(next(iter(batch.values())))


def require_in_batch(batch: Batch, names: Sequence[str]) -> None:
    """Raises `InputError` unless the batch has all of these arrays."""
    if missing := [name for name in names if name not in batch]:
        raise InputError(f"the batch lacks {', '.join(missing)}; it has {', '.join(sorted(batch))}")


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
    return tuple(path for path, _ in attention_layers(nnx.eval_shape(lambda: build(nnx.Rngs(0)))))


def _restorer(module: ModuleT) -> Callable[[Params], ModuleT]:
    structure, state = nnx.split(module)
    _require_only_parameters(state)
    return lambda params: nnx.merge(structure, nnx.restore_int_paths(params))


def _disjoint(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    if taken := sorted(first.keys() & second.keys()):
        raise InputError(f"the model already learns {', '.join(taken)}; give it another name")
    return {**first, **second}


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

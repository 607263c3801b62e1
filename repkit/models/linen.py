"""Flax Linen modules as pure functions, whose layers show what is asked for without an edit."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Key

from repkit.checks import InputError
from repkit.models.capture import NOTHING, Capture, Wanted, captured_outputs, require_known_attention, shown_attention
from repkit.models.functional import Batch, Model, Outputs, Params, rows_of

_COLLECTION = "intermediates"
_PREFIX = "captured_"


def call_deterministic(module: nn.Module, batch: Batch, *, deterministic: bool) -> Outputs:
    """`module(batch, deterministic=deterministic)`."""
    return module(batch, deterministic=deterministic)


def linen_model(
    module: nn.Module,
    example: Batch,
    *,
    call: Callable[..., Outputs] = call_deterministic,
    capture: Capture = NOTHING,
) -> Model:
    """Makes pure functions of a Flax Linen module; no weight is made on the way.

    Args:
        module: the module. It keeps no variables but parameters, and draws random numbers as "dropout" only.
        example: a batch, one example is enough, with everything that the module can take; only its shapes count.
        call: `call(module, batch, deterministic=...) -> outputs`, for a module that is not called as
            `module(batch, deterministic=...)` or does not return a dict.
        capture: what its layers show beside the outputs. Paths are those of the parameters, with dots; attention
            layers are `nn.MultiHeadDotProductAttention` and its kinds, hidden states the outputs of modules that
            are called as `module(...)`.

    Returns:
        The model. With `capture`, its outputs hold what was asked for, for each layer that matches and took part. Where
        a layer sees several views of an example, as consecutive rows or in several runs, the first counts. The other
        outputs are those of the model without `capture`, and nothing else is kept. Through `nn.remat` layers show
        themselves; through `nn.scan` they do not.

    Raises:
        InputError: if a path matches nothing, or the module has variables that are not parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> class Tagger(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, token_ids):
        ...         tokens = nn.Embed(9, 8, name="embedding")(token_ids)
        ...         return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(tokens)
        >>> model = linen_model(
        ...     Tagger(),
        ...     {"token_ids": jnp.ones((1, 5), jnp.int32)},
        ...     call=lambda module, batch, *, deterministic: {"tags": module(batch["token_ids"])},
        ...     capture=Capture(maps=["attention"]),
        ... )
        >>> params = model.init(jax.random.key(0))
        >>> outputs = model.forward(params, {"token_ids": jnp.ones((3, 5), jnp.int32)}, None)
        >>> outputs["tags"].shape, outputs["attention"]["attention"].shape
        ((3, 5, 8), (3, 2, 5, 5))
    """

    def initialise(key: Key[Array, ""]) -> Any:
        return module.init(key, example, deterministic=True, method=call)

    attention, modules = _layers_called(initialise)
    wanted = capture.among(tuple(attention), modules)
    for path in wanted.get("attention", ()):
        require_known_attention(path, attention[path], nn.dot_product_attention)

    def init(key: Key[Array, ""]) -> Params:
        return initialise(key)["params"]

    def forward(params: Params, batch: Batch, key: Key[Array, ""] | None) -> Outputs:
        def apply(**options: Any) -> Any:
            rngs = None if key is None else {"dropout": key}
            return module.apply({"params": params}, batch, deterministic=key is None, rngs=rngs, method=call, **options)

        if not wanted:
            return apply()
        with nn.intercept_methods(functools.partial(_show, wanted, attention)):
            outputs, sown = apply(mutable=[_COLLECTION])
        return outputs | captured_outputs(_shown_by(sown.get(_COLLECTION, {})), wanted, rows_of(batch))

    return Model(init, forward)


def _layers_called(
    initialise: Callable[[Key[Array, ""]], Mapping[str, Any]],
) -> tuple[dict[str, Callable[..., Array]], tuple[str, ...]]:
    """The attention functions of attention layers by path, and the paths of all modules that are called."""
    attention, modules = {}, {}

    def note(next_function: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        path = ".".join(context.module.path)
        if context.method_name == "__call__" and path:
            modules[path] = None
            if isinstance(context.module, nn.MultiHeadDotProductAttention):
                attention[path] = context.module.attention_fn
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(initialise, jax.random.key(0))
    if others := sorted(variables.keys() - {"params"}):
        raise InputError(
            f"every variable of the model must be a parameter, but it has {', '.join(others)}; "
            "state does not pass through forward"
        )
    return attention, tuple(modules)


def _show(
    wanted: Wanted,
    attention: dict[str, Callable[..., Array]],
    next_function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: InterceptorContext,
) -> Any:
    """Calls a method of a module, which sows what is wanted of it."""
    module, path = context.module, ".".join(context.module.path)
    names = tuple(name for name, paths in wanted.items() if path in paths)
    if context.method_name != "__call__" or not names:
        return next_function(*args, **kwargs)
    with _showing(module, attention[path], names) if names != ("hidden",) else nullcontext():
        output = next_function(*args, **kwargs)
    if "hidden" in names:
        module.sow(_COLLECTION, f"{_PREFIX}hidden", output)
    return output


@contextmanager
def _showing(module: Any, attention_fn: Callable[..., Array], names: tuple[str, ...]) -> Iterator[None]:
    """Lets an attention layer sow what it hands to its attention function."""

    @functools.wraps(attention_fn)
    def shown(query: Array, key: Array, value: Array, **keywords: Any) -> Array:
        for name, values in shown_attention(names, query, key, keywords.get("mask"), is_causal=False).items():
            module.sow(_COLLECTION, _PREFIX + name, values)
        return attention_fn(query, key, value, **keywords)

    # Linen refuses to set an attribute of a bound module. Under `nn.remat` a layer is called twice, from outside and
    # within, and the function of the inner call, which is the one to sow, takes the place of the outer one's.
    before = module.attention_fn
    object.__setattr__(module, "attention_fn", shown)
    try:
        yield
    finally:
        object.__setattr__(module, "attention_fn", before)


def _shown_by(sown: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    shown = {}
    for keys, values in jax.tree_util.tree_leaves_with_path(sown, is_leaf=lambda node: isinstance(node, tuple)):
        *path, name = (key.key for key in keys)
        if name.startswith(_PREFIX):
            shown[name.removeprefix(_PREFIX), ".".join(path)] = values[0]
    return shown

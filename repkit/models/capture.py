"""What a model shows of itself beside its outputs: attention maps, queries and keys, hidden states, by layer path.

Nothing of the model is edited. `repkit.models.functional` shows the layers of an NNX module, ours and flax's own
`nnx.MultiHeadAttention`; `repkit.models.linen` those of a Linen module.
"""

import difflib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from repkit.checks import InputError
from repkit.models.layers import Attention, Captured, attention_map

Wanted = Mapping[str, tuple[str, ...]]
"""From a name of the outputs ("attention", "queries", "keys", "hidden") to the paths of its layers."""


@dataclass(frozen=True)
class Capture:
    """The layers that a model shows beside its outputs.

    Each field holds dotted paths in which `*` and `?` stand for any text, such as "text.blocks.*.attention".

    Attributes:
        maps: attention layers whose maps are wanted, `outputs["attention"][path]`, [b heads q k] float32, before any
            dropout.
        queries_keys: attention layers whose queries and keys are wanted, `outputs["queries"][path]` and
            `outputs["keys"][path]`, [b heads l head_dim], not yet scaled: `softmax(q k' / sqrt(head_dim))` is the map,
            the mask apart. No map leaves the model for them. Where fewer key heads serve several query heads, the
            keys are repeated. A flax layer with an `attention_fn` of its own shows what that function is handed, so
            before a rotation by positions that it makes.
        hidden: modules whose output is wanted, `outputs["hidden"][path]`, [b l width]. Of the modules that a path
            matches, those inside another such module are left out: "encoder.blocks.*" means the blocks.

    Raises:
        InputError: for one string where a sequence of them is expected.

    Example:
        >>> Capture(maps=["decoder.blocks.*.cross_attention"], hidden=["encoder.blocks.3"])
        Capture(maps=('decoder.blocks.*.cross_attention',), queries_keys=(), hidden=('encoder.blocks.3',))
    """

    maps: Sequence[str] = ()
    queries_keys: Sequence[str] = ()
    hidden: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            paths = getattr(self, field.name)
            if isinstance(paths, str):
                raise InputError(f"{field.name} of Capture must be a list of paths, got the string '{paths}'")
            object.__setattr__(self, field.name, tuple(paths))

    def among(self, attention: Sequence[str], modules: Sequence[str]) -> Wanted:
        """The layers wanted, by name of output, of a model with these attention layers and modules.

        Args:
            attention: paths of the attention layers.
            modules: paths of all modules that can be called.

        Raises:
            InputError: if a path matches nothing; the message lists near ones.

        Example:
            >>> Capture(hidden=["blocks.*"]).among(["blocks.0.attention"], ["blocks.0", "blocks.0.attention"])
            {'hidden': ('blocks.0',)}
        """
        queries_keys = _matching(self.queries_keys, attention, "attention layer")
        wanted = {
            "attention": _matching(self.maps, attention, "attention layer"),
            "queries": queries_keys,
            "keys": queries_keys,
            "hidden": _matching(self.hidden, modules, "module", of=_outermost),
        }
        return {name: paths for name, paths in wanted.items() if paths}


NOTHING = Capture()
"""A model's outputs and no more."""


def captured_outputs(
    shown: Mapping[tuple[str, str], Any], wanted: Wanted, rows: int
) -> dict[str, dict[str, Float[Array, "b ..."]]]:
    """The part of a model's outputs that was captured.

    Args:
        shown: from (name of output, path of layer) to what the layer showed in its first run.
        wanted: what was asked for; a layer that took no part is left out.
        rows: examples in the batch. Of consecutive rows that are views of one example the first is taken.

    Raises:
        InputError: for a value that has no axis of examples in front, as under `scan` over layers.
    """

    def first_view(name: str, path: str) -> Array:
        values = shown[name, path]
        rank = "3" if name == "hidden" else "4"
        shape = getattr(values, "shape", None)
        if shape is None or shape[:1] == () or shape[0] % rows or (name != "hidden" and len(shape) != 4):
            came = type(values).__name__ if shape is None else f"shape {list(shape)}"
            raise InputError(
                f"cannot capture '{path}': its {name} must be an array of {rank} axes with {rows} examples first, "
                f"got {came}"
            )
        return values.reshape(rows, -1, *shape[1:])[:, 0]

    return {
        name: {path: first_view(name, path) for path in paths if (name, path) in shown}
        for name, paths in wanted.items()
    }


def shown_attention(
    names: Collection[str],
    query: Float[Array, "b q heads head_dim"],
    key: Float[Array, "b k key_heads head_dim"],
    mask: Bool[Array, "#b #heads #q #k"] | None,
    *,
    is_causal: bool,
) -> dict[str, Array]:
    """What a layer shows that hands these queries and keys to flax's `dot_product_attention`.

    Args:
        names: any of "attention", "queries" and "keys".
        query: not yet scaled.
        key: with as many heads as the queries, or a divisor of that number.
        mask: True, or not zero, where a query may see a key.
        is_causal: whether a query sees no key behind its own place.
    """
    if key.shape[-2] != query.shape[-2]:
        key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    shown = {}
    if "attention" in names:
        mask = None if mask is None else mask.astype(bool)
        if is_causal:
            causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
            mask = causal if mask is None else mask & causal
        shown["attention"] = attention_map(query, key, mask)
    if "queries" in names:
        shown["queries"] = query.swapaxes(-2, -3)
        shown["keys"] = key.swapaxes(-2, -3)
    return shown


def require_known_attention(path: str, attention_fn: Callable[..., Any], known: Callable[..., Any]) -> None:
    """Raises `InputError` if the map of a flax layer is wanted that does not attend by flax's own function."""
    if attention_fn is not known:
        raise InputError(
            f"cannot capture the map of '{path}': it attends by its own attention_fn, of which only the queries and "
            "keys that it is handed are known; use queries_keys"
        )


def attention_layers(module: nnx.Module) -> Iterator[tuple[str, Attention | nnx.MultiHeadAttention]]:
    """The attention layers of an NNX module with their dotted paths."""
    for path, layer in _modules(module):
        if isinstance(layer, Attention | nnx.MultiHeadAttention):
            yield path, layer


def show(module: nnx.Module, capture: Capture) -> Wanted:
    """Makes the layers of an NNX module sow what is asked for, as `Captured` variables, when they are called.

    The module itself is changed, and only it: not its class, its parameters or their paths. A module that is not
    called as `module(...)`, but by a function of its class that was looked up before, shows no hidden state.

    Returns:
        The layers, by name of output.

    Raises:
        InputError: if a path matches nothing.
    """
    attention, modules = dict(attention_layers(module)), dict(_modules(module))
    wanted = capture.among(tuple(attention), tuple(path for path, layer in modules.items() if callable(layer)))
    for path, layer in attention.items():
        names = tuple(name for name in ("attention", "queries", "keys") if path in wanted.get(name, ()))
        if not names:
            continue
        if isinstance(layer, Attention):
            layer.captured = names
            continue
        if "attention" in names:
            require_known_attention(path, layer.attention_fn, nnx.dot_product_attention)
        # What was a plain function becomes a part that can sow; `nnx.data` says that this is meant.
        layer.attention_fn = nnx.data(_ShownAttention(layer.attention_fn, names))
    for path in wanted.get("hidden", ()):
        # A module's own __setattr__ takes every name for a part of the module.
        object.__setattr__(modules[path], "__class__", _showing_output(type(modules[path])))
    return wanted


def shown_by(sown: nnx.State) -> dict[tuple[str, str], Any]:
    """What the layers that `show` has changed have sown in one call, for `captured_outputs`."""
    shown = {}
    for path, values in nnx.to_flat_state(sown):
        layer = path[:-2] if path[-2] == "attention_fn" else path[:-1]
        shown[str(path[-1]), ".".join(map(str, layer))] = values.get_value()[0]
    return shown


class _ShownAttention(nnx.Module):
    """The attention function of a flax layer; it sows what it is handed and does what it did."""

    def __init__(self, attention_fn: Callable[..., Array], names: tuple[str, ...]):
        self.function = attention_fn
        self.names = names

    def __call__(self, query: Array, key: Array, value: Array, **keywords: Any) -> Array:
        is_causal = keywords.get("is_causal", False)
        shown = shown_attention(self.names, query, key, keywords.get("mask"), is_causal=is_causal)
        for name, values in shown.items():
            self.sow(Captured, name, values)
        return self.function(query, key, value, **keywords)


@functools.cache
def _showing_output(kind: Any) -> type[nnx.Module]:
    """The class of modules like those of `kind` that sow their output."""

    def call(self, *arguments: Any, **keywords: Any) -> Any:
        output = kind.__call__(self, *arguments, **keywords)
        self.sow(Captured, "hidden", output)
        return output

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _modules(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for path, part in nnx.iter_modules(module):
        if path:
            yield ".".join(map(str, path)), part


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))


def _matching(
    patterns: Sequence[str], paths: Sequence[str], kind: str, *, of: Callable[[Sequence[str]], Sequence[str]] = tuple
) -> tuple[str, ...]:
    """The paths that match any of the patterns, in their own order; of each pattern's, those that `of` chooses."""
    chosen = set()
    for pattern in patterns:
        matches = of([path for path in paths if fnmatchcase(path, pattern)])
        if not matches:
            near = difflib.get_close_matches(pattern, paths, n=4, cutoff=0.0)
            raise InputError(
                f"capture path '{pattern}' matches no {kind}; "
                f"near ones: {', '.join(near) if near else f'none, the model has no {kind}s'}"
            )
        chosen.update(matches)
    return tuple(path for path in paths if path in chosen)

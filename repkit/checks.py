"""Checks of what a caller hands in, made at trace time, with messages that a user can act on.

Every check raises `InputError` (a `ValueError`) whose text says what was expected, what came and, where it is not
obvious, what to do. The command line turns an `InputError` into one line and exit code 2.
"""

import difflib
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class InputError(ValueError):
    """Something that the caller handed in cannot be used; the message says what, and what would be right."""


class RunWarning(UserWarning):
    """Something went wrong that a run can go on without; the message says in one line what, and what was done."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> InputError:
    """The error for a name that is not among the valid ones; it offers the nearest.

    >>> print(unknown_name("loss", "info_nse", ["info_nce", "gamma_contrastive"]))
    unknown loss 'info_nse'; did you mean 'info_nce'? Valid: gamma_contrastive, info_nce
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    listed = ", ".join(names) if len(names) <= 40 else f"{len(names)} names"
    return InputError(f"unknown {kind} '{name}'; {hint}Valid: {listed}")


def shown(value: Any) -> str:
    """A value as it stands in a message: its beginning, if it is long.

    >>> shown(["a" * 10]), len(shown("b" * 10_000))
    ("['aaaaaaaaaa']", 201)
    """
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def require_choice(argument: str, value: str, valid: Iterable[str]) -> None:
    """Raises `InputError` unless `value` is one of the names in `valid`."""
    valid = tuple(valid)
    if value not in valid:
        raise unknown_name(argument, value, valid)


def require_key(caller: str, key: jax.Array | None, needed_for: str) -> jax.Array:
    """The key, if it is one typed JAX random key; raises `InputError` otherwise."""
    if key is None:
        raise InputError(f"{caller}: {needed_for} needs a random key; pass key=jax.random.key(seed)")
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and np.shape(key) == ()):
        raise InputError(
            f"{caller}: expected key to be one typed random key, from jax.random.key; got {_describe(key)}"
        )
    return key


def require_range(
    caller: str,
    argument: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises `InputError` where a Python number is out of range; a traced or array value cannot be looked at.

    >>> require_range("info_nce", "share", 2.0, above=0, at_most=1)
    Traceback (most recent call last):
    repkit.checks.InputError: info_nce: expected share > 0 and <= 1, got 2.0
    """
    if not isinstance(value, (int, float)):
        return
    limits = ((">", above, operator.gt), (">=", at_least, operator.ge), ("<=", at_most, operator.le))
    wanted = [(sign, limit, holds) for sign, limit, holds in limits if limit is not None]
    if not all(holds(value, limit) for _, limit, holds in wanted):
        expected = " and ".join(f"{sign} {limit}" for sign, limit, _ in wanted)
        raise InputError(f"{caller}: expected {argument} {expected}, got {value}")


_KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool_, "number": jnp.number}


def require_arrays(caller: str, arguments: Mapping[str, tuple[Any, str]]) -> None:
    """Raises `InputError` unless every argument has the kind and the shape that it should have.

    Args:
        caller: the function that the user called, to begin the message with.
        arguments: name to (value, specification). A specification is a kind (`float`, `int`, `bool`, or `number` for
            float or int) and the names of the axes, as in `"float b d"`; axes of one name must have one length in all
            arguments. An argument that is None is passed over.

    Example:
        >>> image, text = np.ones((8, 4)), np.ones((7, 4))
        >>> require_arrays("info_nce", {"image": (image, "float b d"), "text": (text, "float b d")})
        Traceback (most recent call last):
        repkit.checks.InputError: info_nce: expected b = 8, as in image, got b = 7 in text.
            Expected image: float[b, d], text: float[b, d]; got image: float64[8, 4], text: float64[7, 4]
    """
    given = {name: value for name, (value, _) in arguments.items() if value is not None}
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in given.items():
        kind, *axes = arguments[name][1].split()
        problem = _problem(name, value, kind, axes, sizes)
        if problem:
            expected = ", ".join(f"{each}: {_specification(arguments[each][1])}" for each in given)
            got = ", ".join(f"{each}: {_describe(array)}" for each, array in given.items())
            raise InputError(f"{caller}: {problem}. Expected {expected}; got {got}")


def _problem(name: str, value: Any, kind: str, axes: list[str], sizes: dict[str, tuple[int, str]]) -> str | None:
    """What is wrong with one argument, given the axis lengths met so far; adds its own to them."""
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    if not is_array and not (kind == "number" and type(value) in (int, float)):
        return f"expected {name} to be an array, got {type(value).__name__}"
    if is_array and not jnp.issubdtype(value.dtype, _KINDS[kind]):
        return f"expected {name} to hold {kind} values, got {value.dtype}"
    shape = np.shape(value)
    if len(shape) != len(axes):
        return f"expected {name} to have {len(axes)} axes, got {len(shape)}"
    for axis, size in zip(axes, shape, strict=True):
        known, owner = sizes.setdefault(axis, (size, name))
        if size != known:
            return f"expected {axis} = {known}, as in {owner}, got {axis} = {size} in {name}"
    return None


def _specification(specification: str) -> str:
    kind, *axes = specification.split()
    return f"{kind}[{', '.join(axes)}]"


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__

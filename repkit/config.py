"""Typed configurations: nested frozen dataclasses that are overridden by dotted names, written to JSON and compared.

Fields may be bool, int, float, str, a `Literal`, an optional one of these (`X | None`), `tuple[X, ...]`,
`dict[str, X]`, or another dataclass.
"""

import contextlib
import dataclasses
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from repkit.checks import InputError, unknown_name

C = TypeVar("C")

_FORMERLY = "formerly"


def formerly(value: Any) -> dict[str, Any]:
    """The metadata of a field that came later than runs which are still to be read.

    Args:
        value: what runs did that were made without the field; `from_json` puts it where the field is missing.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     steps: int = 100
        ...     shuffle: bool = dataclasses.field(default=True, metadata=formerly(False))
        >>> from_json(Config, {"steps": 50})
        Config(steps=50, shuffle=False)
    """
    return {_FORMERLY: value}


def flatten(config: Any) -> dict[str, Any]:
    """The leaves of a configuration by dotted name.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Train:
    ...     steps: int = 100
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     loss: str = "info_nce"
    ...     train: Train = Train()
    >>> flatten(Config())
    {'loss': 'info_nce', 'train.steps': 100}
    """
    return dict(_leaves(config, ""))


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def override(config: C, settings: Sequence[str]) -> C:
    """Replaces fields of a configuration by `name=value` texts.

    Values are read by the field's type: `true`/`false`, numbers, text, `none` for an optional field, `a,b,c` for a
    tuple (empty for none at all), `a=1,b=2` for a dict.

    Args:
        config: the configuration.
        settings: texts such as `"train.steps=200"`.

    Returns:
        A new configuration.

    Raises:
        InputError: for an unknown name (with the nearest valid one) or a value that the field's type does not take.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     steps: int = 100
        ...     mode: Literal["min", "max"] = "max"
        >>> override(Config(), ["steps=200", "mode=min"])
        Config(steps=200, mode='min')
    """
    values: dict[str, Any] = {}
    names = flatten(config)
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise InputError(f"a setting has the form name=value, got '{setting}'")
        if name not in names:
            raise unknown_name("setting", name, names)
        values[name] = _read(text, _type_of(type(config), name), name)
    return replace(config, values)


def replace(config: C, values: Mapping[str, Any]) -> C:
    """Replaces leaves of a configuration, by dotted name."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    own |= {head: replace(getattr(config, head), rest) for head, rest in nested.items()}
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values, ready for `json.dump`."""
    return dataclasses.asdict(config)


def from_json(kind: type[C], data: Mapping[str, Any], prefix: str = "") -> C:
    """Rebuilds a configuration of the given type from `to_json`'s values.

    Raises:
        InputError: for an unknown or missing name, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"expected the settings {prefix or 'of a run'} by name, got {data!r}")
    hints = get_type_hints(kind)
    values = {}
    for name, value in data.items():
        if name not in hints:
            raise unknown_name("setting", f"{prefix}{name}", [f"{prefix}{hint}" for hint in hints])
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = from_json(hint, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            values[name] = _checked(value, hint, f"{prefix}{name}")
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name not in values and _FORMERLY in item.metadata:
            values[item.name] = item.metadata[_FORMERLY]
    missing = [f"{prefix}{name}" for name in hints if name not in values]
    if missing:
        # Today's defaults need not be those of the version that wrote the values.
        raise InputError(f"settings are missing: {', '.join(missing)}")
    return kind(**values)


def differences(one: Any, other: Any) -> list[str]:
    """The leaves in which two configurations differ, as `name: one's value -> other's value`.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     steps: int = 100
    >>> differences(Config(), Config(steps=200))
    ['steps: 100 -> 200']
    """
    left, right = flatten(one), flatten(other)
    absent = "(absent)"
    return [
        f"{name}: {left.get(name, absent)} -> {right.get(name, absent)}"
        for name in dict.fromkeys([*left, *right])
        if left.get(name, absent) != right.get(name, absent)
    ]


def _type_of(kind: Any, name: str) -> Any:
    for part in name.split("."):
        kind = get_type_hints(kind)[part]
    return kind


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else _describe(arg) for arg in get_args(hint))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint) or str(hint)


def _read(text: str, hint: Any, name: str) -> Any:
    """Reads a value of the hinted type from text."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _read(text, inner, name)
    if origin is Literal:
        if text not in arguments:
            raise unknown_name(f"value of {name}", text, map(str, arguments))
        return text
    if origin is tuple:
        return tuple(_read(part, arguments[0], name) for part in text.split(",") if part)
    if origin is dict:
        pairs = (part.partition("=") for part in text.split(",") if part)
        return {key: _read(value, arguments[1], name) for key, _, value in pairs}
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float, str):
        with contextlib.suppress(ValueError):
            value = hint(text)
            # NaN is not even equal to itself: a run with it in its configuration could never be resumed.
            if not isinstance(value, float) or math.isfinite(value):
                return value
    raise InputError(f"{name} takes {_describe(hint)}, got '{text}'")


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Checks a value from JSON against the hinted type; lists become tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _checked(value, inner, name)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_checked(part, arguments[0], name) for part in value)
    if origin is dict and isinstance(value, dict):
        return {key: _checked(part, arguments[1], name) for key, part in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise InputError(f"{name} takes {_describe(hint)}, got {value!r}")

"""Options of a plugin: dataclass fields with a type and a help text, bound from strings or values.

`option(0.5, "exponent of the input norm")` is `dataclasses.field` with the help kept in the
metadata; a plain annotated field with a default works as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from neuroal.errors import UsageError, nearest

_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})


def option(default: Any, help: str = "") -> Any:
    """Return a dataclass field with a default and a help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def type_name(annotation: Any) -> str:
    """Return a type as a user reads it: `int or None`, `row or matrix`, `list of float`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return f"list of {type_name(arguments[0])}"
    if origin is not None or not isinstance(annotation, type):
        return str(annotation)
    return "None" if annotation is type(None) else annotation.__name__


def convert(value: Any, annotation: Any) -> Any:
    """Convert a string from the command line, or a value, to the annotated type.

    An annotation is bool, int, float, str, `tuple[T, ...]`, `Literal[...]`, or a union of those
    and None, of which the first that fits is taken.

    Raises:
        ValueError: The value is not of that type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in arguments:
                return None
            raise ValueError
        for member in arguments:
            with contextlib.suppress(ValueError, TypeError):
                return convert(value, member)
        raise ValueError
    if origin is typing.Literal:
        for choice in arguments:
            if str(value) == str(choice):  # == alone would take True for 1
                return choice
        raise ValueError
    if origin is tuple and arguments[1:] == (Ellipsis,):
        if isinstance(value, str):  # an empty string is an empty list
            value = value.split(",") if value.strip() else ()
        return tuple(convert(i.strip() if isinstance(i, str) else i, arguments[0]) for i in value)
    if annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        raise ValueError
    if annotation is int:
        return _integer(value)
    if annotation is float and isinstance(value, (str, int, float)):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError from None
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
        return number
    if annotation is str and isinstance(value, str):
        return value
    raise ValueError


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)  # exact beyond 2^53, where a float is not
    number: float = convert(value, float)  # "1e3", 8.0
    if number != int(number):
        raise ValueError
    return int(number)


def bind(plugin: type, options: Mapping[str, Any], name: str) -> Any:
    """Return an instance of a plugin's class with options set.

    Strings are converted to the types of the fields; `name` is the plugin's, for messages.

    Raises:
        UsageError: An option is unknown, of the wrong type, or refused by the plugin.
    """
    hints = typing.get_type_hints(plugin)
    fields = {f.name for f in _fields(plugin)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            cure = nearest(key, fields) if fields else "it has no options"
            raise UsageError(f"plugin '{name}' has no option '{key}': {cure}")
        try:
            values[key] = convert(value, hints[key])
        except (ValueError, TypeError):
            raise UsageError(
                f"option {name}.{key}={value!r} is not {type_name(hints[key])}"
            ) from None
    for f in _fields(plugin):
        if f.name not in values and _default(f) is dataclasses.MISSING:
            kind = type_name(hints[f.name])
            raise UsageError(f"plugin '{name}' needs the option {name}.{f.name} ({kind})")
    try:
        return plugin(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"plugin '{name}' refuses its options: {error}") from None


def values(plugin: Any) -> dict[str, Any]:
    """Return the options of a plugin instance as JSON values."""
    result = {}
    for f in _fields(plugin):
        value = getattr(plugin, f.name)
        result[f.name] = list(value) if isinstance(value, tuple) else value
    return result


def describe(plugin: type) -> list[tuple[str, str, str, str]]:
    """Return (name, type, default, help) of every option of a plugin class."""
    hints = typing.get_type_hints(plugin)
    rows = []
    for f in _fields(plugin):
        value = _default(f)
        default = "required" if value is dataclasses.MISSING else _text(value)
        rows.append((f.name, type_name(hints[f.name]), default, f.metadata.get("help", "")))
    return rows


def untyped(plugin: type) -> dict[str, str]:
    """Return what looks like an option of a plugin class but has no type, with what to write.

    A dataclass makes no field of `alpha = 0.5`. Names that begin with an underscore, and constants
    in capitals, are meant as they are.
    """
    typed = {name for base in plugin.__mro__ for name in inspect.get_annotations(base)}
    found = {}
    for base in plugin.__mro__[:-1]:
        for name, value in vars(base).items():
            plain = value is None or isinstance(value, (bool, int, float, str, tuple))
            if plain and name not in typed and not name.startswith("_") and not name.isupper():
                kind = "int | None" if value is None else type(value).__name__
                kind = "tuple[float, ...]" if isinstance(value, tuple) else kind
                found[name] = f"it has no type: write {name}: {kind} = {value!r}"
    return found


def _text(value: Any) -> str:
    # As it is typed on the command line.
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _fields(plugin: Any) -> list[dataclasses.Field[Any]]:
    # A field that `__init__` does not take is not an option.
    return [f for f in dataclasses.fields(plugin) if f.init]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()

"""What makes a class a plugin of its role, checked before anything is registered.

Every check returns the first problem as half a sentence that ends in its cure, or None; the caller
puts role, name, distribution and version before it.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from neuroal import options
from neuroal.errors import nearest
from neuroal.hookspecs import ROLES, Role, hookimpl
from neuroal.types import REMOVED

DECORATOR = "@dataclass(frozen=True, eq=False)"
OPTION_TYPES = "bool, int, float, str, Literal[...], tuple[T, ...], or one of them or None"
_MARK = f"{hookimpl.project_name}_impl"


def problem(role: Role, kind: object) -> str | None:
    """Return what keeps `kind` from being a plugin of `role`, or None."""
    if not isinstance(kind, type):
        return f"is {type(kind).__name__}, not a class: name the dataclass itself"
    return _class_problem(kind) or _hooks_problem(role, kind)


def values_problem(plugin: Any) -> str | None:
    """Return which option of a plugin instance has a value that its type does not allow, or None.

    What passes can be written into a recipe and read back.
    """
    hints = typing.get_type_hints(type(plugin))
    for field in dataclasses.fields(plugin):
        if not field.init:
            continue
        value = getattr(plugin, field.name)
        try:
            options.convert(value, hints[field.name])
        except (ValueError, TypeError):
            wanted = options.type_name(hints[field.name])
            return f"option {field.name}={value!r} is not {wanted}: an option is {OPTION_TYPES}"
    return None


def hooks(kind: type) -> dict[str, str]:
    """Return the hooks of a class: the name of the hook to the name of the method marked as it."""
    names = {}
    for method in dir(kind):
        mark = getattr(_function(kind, method), _MARK, None)
        if isinstance(mark, Mapping):
            names[mark.get("specname") or method] = method
    return names


@cache
def arguments(hook: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of a hook specification, in order."""
    return tuple(inspect.signature(hook).parameters)[1:]  # without self


def _class_problem(kind: type) -> str | None:
    if "__dataclass_fields__" not in vars(kind):
        return f"{kind.__name__} is not a dataclass: decorate it with {DECORATOR}"
    if not vars(kind)["__dataclass_params__"].frozen:
        return f"{kind.__name__} is not frozen: decorate it with {DECORATOR}"
    if any("__eq__" in vars(base) or "__hash__" in vars(base) for base in kind.__mro__[:-1]):
        return f"{kind.__name__} compares by value: decorate it, and its bases, with {DECORATOR}"
    try:
        typing.get_type_hints(kind)
    except Exception as error:
        return f"an option's type cannot be read ({error}): an option is {OPTION_TYPES}"
    return None


def _hooks_problem(role: Role, kind: type) -> str | None:
    marked = hooks(kind)
    for hook, method in marked.items():
        problem = _hook_problem(role, kind, hook, method)
        if problem:
            return problem
    for hook in role.hooks:
        if hook not in marked and _function(kind, hook) is not None:
            return f"method {hook} is not marked: put @hookimpl (from neuroal) above it"
    present = [hook for hook in role.required if hook in marked]
    if not present:
        wanted = " or ".join(role.required)
        return f"has no hook {wanted}: role {role.name} needs it, marked with @hookimpl"
    if role.exclusive and len(present) > 1:
        return f"has hooks {' and '.join(present)}: role {role.name} takes exactly one of them"
    return None


def _hook_problem(role: Role, kind: type, hook: str, method: str) -> str | None:
    function = _function(kind, method)
    assert function is not None
    mark = getattr(function, _MARK)
    if hook not in role.hooks:
        owner = next((r.name for r in ROLES.values() if hook in r.hooks), None)
        if owner:
            return f"hook {hook} belongs to role {owner}: declare it there, or remove the hook"
        if hook in REMOVED["hook"]:
            return f"hook {hook} is not called any more: {REMOVED['hook'][hook]}"
        if mark.get("optionalhook"):  # of another version of neuroal
            return None
        return f"hook {hook} is unknown: {nearest(hook, role.hooks)}"
    if mark.get("wrapper") or mark.get("hookwrapper"):
        return f"hook {hook} is a wrapper: a plugin answers for itself alone, use a plain @hookimpl"
    valid = arguments(role.hooks[hook])
    parameters = list(inspect.signature(function).parameters.values())
    if not isinstance(inspect.getattr_static(kind, method), staticmethod):
        if not parameters or parameters[0].name in valid:
            return f"hook {hook} has no self: make it its first argument"
        del parameters[0]
    return _arguments_problem(hook, valid, parameters)


def _arguments_problem(
    hook: str, valid: tuple[str, ...], parameters: list[inspect.Parameter]
) -> str | None:
    for parameter in parameters:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return (
                f"hook {hook} takes {parameter}: name the arguments it wants ({', '.join(valid)})"
            )
        if parameter.default is not parameter.empty:
            return (
                f"hook {hook} gives its argument '{name}' a default, and hooks have none: "
                "remove it, or make an option (a field) of the argument"
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            return f"hook {hook} has the keyword-only argument '{name}': remove the *"
        if name not in valid:
            return f"hook {hook} has no argument '{name}': {nearest(name, valid)}"
    return None


def _function(kind: type, name: str) -> Callable[..., Any] | None:
    # Read statically, as pluggy does: nothing of the plugin runs.
    value = inspect.getattr_static(kind, name, None)
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if inspect.isfunction(value) else None

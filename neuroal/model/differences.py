"""What tells the run that is asked for from the one that a folder holds, in half a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN = 3
_FILES = {
    "model": "the model's weights or config are others",
    "data": "the calibration tokens are others",
    "allocation": "the ratios of the allocation are others",
}


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return what differs between what decided a run and what decides this one.

    Both have JSON values: `recipe`, `plugins` (what each one says of itself), and hashes of
    `model`, `data` and `allocation`. Where one has no such entry, nothing is said of it.
    """
    found = list(_recipes(there.get("recipe"), asked.get("recipe")))
    found += _plugins(there.get("plugins") or (), asked.get("plugins") or (), found)
    for key, said in _FILES.items():
        if key in there and key in asked and there[key] != asked[key]:
            found.append(said)
    more = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join(found[:_SHOWN] + more) or "recipe, model, data or plugins are others"


def _recipes(there: Any, asked: Any) -> Iterator[str]:
    old, new = dict(_flat(there)), dict(_flat(asked))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name} is {_text(old.get(name))} there and {_text(new.get(name))} here"


def _flat(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a recipe, and every option of a plugin by itself."""
    for name, value in (recipe or {}).items():
        if name != "options":
            yield name, value
            continue
        for plugin, values in value.items():
            yield from ((f"{plugin}.{key}", x) for key, x in values.items())


def _text(value: Any) -> str:
    return "not given" if value is None else f"{value!s:.60}"


def _plugins(
    there: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]], said: Sequence[str]
) -> Iterator[str]:
    """Yield the plugins that are not as they were, where the recipe says nothing of that."""
    old = {(p["role"], p["name"]): p for p in there}
    new = {(p["role"], p["name"]): p for p in asked}
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key] and not (said and old[key]["options"] != new[key]["options"]):
            versions = old[key]["version"], new[key]["version"]
            how = "its code is another"
            if versions[0] != versions[1]:
                how = f"version {versions[0]} there and {versions[1]} here"
            elif old[key]["options"] != new[key]["options"]:
                how = "its options are others"
            yield f"{key[0]} '{key[1]}': {how}"

"""From choices to plugins of one run: import, check, bind options, register.

Every run has a pluggy registration of its own; nothing is global.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pluggy

from neuroal import options as _options
from neuroal.errors import NeuroalError, PluginError, UsageError, nearest
from neuroal.hookspecs import ROLES, SPECS
from neuroal.plugins import contract
from neuroal.plugins.calls import Plugin
from neuroal.plugins.listing import (
    TOP_UP,
    Listing,
    find,
    in_file,
    listing_of,
    module_of,
    object_of,
    one_line,
    refuse,
)
from neuroal.types import TopUp

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """What there is to say about a plugin that imports.

    Attributes:
        listing: Role, name, distribution and version.
        doc: Docstring; of a top-up, its line of help.
        options: (name, type, default, help) of every option; of a top-up, what it sets.
        hooks: Names of its hooks.
        source: File that it comes from, if there is one.
        sha256: Of the file's bytes.
    """

    listing: Listing
    doc: str
    options: tuple[tuple[str, str, str, str], ...]
    hooks: tuple[str, ...]
    source: Path | None
    sha256: str | None


def load(
    choices: Sequence[tuple[str, object]],
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> list[Plugin]:
    """Return the chosen plugins, checked, bound to their options and registered for one run.

    Nothing else is imported, and nothing but imported modules outlives the returned plugins.

    Args:
        choices: Role and choice: an entry-point name, `distribution:name`, `./mine.py:Mine`, or an
            instance of a frozen dataclass.
        options: Plugin name to its options. They are for every chosen plugin of that name that has
            such an option, whatever its role; instances come with theirs.

    Returns:
        One plugin per choice, in order.

    Raises:
        UsageError: A name is unknown or offered twice, a plugin may not load, or an option is
            wrong.
        PluginError: A plugin does not import, breaks the contract of its role, or is for another
            version of neuroal.
    """
    chosen = [
        (listing_of(role, choice), None if isinstance(choice, str) else choice)
        for role, choice in choices
    ]
    _refuse_repeats(chosen)
    for listing, _ in chosen:
        refuse(listing)
    kinds = [
        _checked(listing, object_of(listing) if instance is None else type(instance))
        for listing, instance in chosen
    ]
    shares = _shares(chosen, kinds, options or {})
    instances = [
        _bound(listing, kind, share) if instance is None else instance
        for (listing, instance), kind, share in zip(chosen, kinds, shares, strict=True)
    ]
    for (listing, _), instance in zip(chosen, instances, strict=True):
        problem = contract.values_problem(instance)
        if problem:
            raise PluginError(f"{listing}: {problem}")
    return _registered([listing for listing, _ in chosen], instances)


def load_top_up(name: str) -> TopUp:
    """Return the preset called `name`, `distribution:name` or `./mine.py:MINE`.

    Raises:
        UsageError: The name is unknown, or offered twice.
        PluginError: It does not import, or is no `TopUp`.
    """
    return _top_up(listing_of(TOP_UP, name))


def listings(name: str, role: str | None = None) -> list[Listing]:
    """Return every listing of a name, or of `./file.py:Class` in the roles that it has hooks of.

    Args:
        name: A name from the list, `distribution:name`, or `./file.py:Class`.
        role: Only this role.

    Raises:
        UsageError: There is none.
        PluginError: The file does not import.
    """
    if not in_file(name):
        return find(name, role)
    if role is not None:
        return [listing_of(role, name)]
    in_roles = [listing_of(x, name) for x in ROLES]
    found = object_of(in_roles[0])
    if isinstance(found, TopUp):
        return [listing_of(TOP_UP, name)]
    marked = contract.hooks(found) if isinstance(found, type) else {}
    fitting = [x for x in in_roles if any(hook in marked for hook in ROLES[x.role].required)]
    if not fitting:
        raise UsageError(f"'{name}' has the hooks of no role: give --role to see what it lacks")
    return fitting


def refuse_unused(options: Iterable[str], used: Iterable[str]) -> None:
    """Refuse options for a plugin that is not in use.

    Args:
        options: Names of plugins that have been given options.
        used: Names of the plugins in use.

    Raises:
        UsageError: There are such options.
    """
    names = sorted(set(used))
    for name in options:
        if name not in names:
            raise UsageError(
                f"options for '{name}', which is not used: this run uses {', '.join(names)}"
            )


def describe(listing: Listing) -> Description:
    """Import one plugin and return what there is to say about it.

    Raises:
        PluginError: It does not import, or breaks the contract of its role.
    """
    if listing.role == TOP_UP:
        top_up = _top_up(listing)
        source = _source(module_of(listing).__name__)
        rows = [(key, "", text, "") for key, text in _set_by(top_up)]
        return Description(listing, top_up.help, tuple(rows), (), source, _sha256(source))
    kind = _checked(listing, object_of(listing))
    source = _source(kind.__module__)
    doc, hooks = inspect.getdoc(kind) or "", tuple(sorted(contract.hooks(kind)))
    rows = _options.describe(kind)
    return Description(listing, doc, tuple(rows), hooks, source, _sha256(source))


def _set_by(top_up: TopUp) -> Iterator[tuple[str, str]]:
    """Yield what a preset sets, in words; what was not measured is left out."""
    for key, value in vars(top_up).items():
        if key == "help" or (key in ("excess", "candidates") and not value):
            continue
        if key == "excess":
            shares = " and ".join(f"{x:g} with {tokens:,} tokens" for tokens, x in value.items())
            yield key, f"of plain Wanda's ln(perplexity / dense perplexity) it leaves {shares}"
        elif key == "candidates":
            yield key, f"as many as {value:g} on all search windows, at most"
        elif key == "options":
            given = [f"{plugin}.{k}={v}" for plugin, x in value.items() for k, v in x.items()]
            yield key, ", ".join(given) or "none"
        elif key == "block_ratios":
            yield key, ", ".join(value)
        else:
            yield key, "none" if value is None else str(value)


def _top_up(listing: Listing) -> TopUp:
    top_up = object_of(listing)
    if not isinstance(top_up, TopUp):
        raise PluginError(f"{listing}: is {type(top_up).__name__}: make it a neuroal.TopUp")
    if isinstance(top_up.block_ratios, str):
        raise PluginError(f"{listing}: block_ratios is a string: write ('name',)")
    if not top_up.search_samples > 0:
        number = top_up.search_samples
        raise PluginError(f"{listing}: search_samples {number} is not a positive number")
    if not all(tokens > 0 and excess >= 0 for tokens, excess in top_up.excess.items()):
        raise PluginError(f"{listing}: excess is not tokens > 0 with shares of an excess >= 0")
    return top_up


def _checked(listing: Listing, kind: object) -> type:
    problem = contract.problem(ROLES[listing.role], kind)
    if problem:
        raise PluginError(f"{listing}: {problem}")
    assert isinstance(kind, type)
    _say_untyped(listing, kind)
    return kind


@cache  # once, however often a run loads its plugins
def _say_untyped(listing: Listing, kind: type) -> None:
    """Warn of what looks like an option and is none."""
    for name, cure in _options.untyped(kind).items():
        log.warning("%s: '%s' is no option: %s", listing, name, cure)


def _refuse_repeats(chosen: Sequence[tuple[Listing, object]]) -> None:
    seen = set()
    for listing, instance in chosen:
        key = listing if instance is None else id(instance)
        if key in seen:
            raise UsageError(f"{listing} is chosen twice: once is enough")
        seen.add(key)


def _shares(
    chosen: Sequence[tuple[Listing, object]],
    kinds: Sequence[type],
    given: Mapping[str, Mapping[str, object]],
) -> list[dict[str, object]]:
    """Deal the options, which are by name, out to the chosen plugins that have them."""
    refuse_unused(given, {listing.name for listing, _ in chosen})
    shares: list[dict[str, object]] = [{} for _ in chosen]
    fields = [{row[0] for row in _options.describe(kind)} for kind in kinds]
    for name, values in given.items():
        named = [i for i, (listing, _) in enumerate(chosen) if listing.name == name]
        bindable = [i for i in named if chosen[i][1] is None]
        if not bindable:
            listing = chosen[named[0]][0]
            raise UsageError(
                f"options for {listing}, which was given as an instance: set them there"
            )
        if not isinstance(values, Mapping):
            raise UsageError(f"options for '{name}' are {values!r}: give names and values")
        for key, value in values.items():
            holders = [i for i in bindable if key in fields[i]]
            if not holders:
                valid = set().union(*(fields[i] for i in bindable))
                cure = nearest(key, valid) if valid else "it has no options"
                untyped = [_options.untyped(kinds[i]).get(key) for i in bindable]
                cure = next(filter(None, untyped), cure)
                raise UsageError(f"plugin '{name}' has no option '{key}': {cure}")
            for i in holders:
                shares[i][key] = value
    return shares


def _bound(listing: Listing, kind: type, share: Mapping[str, object]) -> Any:
    try:
        return _options.bind(kind, share, listing.name)
    except NeuroalError:
        raise
    except Exception as error:  # __post_init__
        raise PluginError(f"{listing}: refuses its options: {one_line(error)}") from error


def _registered(listings: Sequence[Listing], instances: Sequence[Any]) -> list[Plugin]:
    manager = pluggy.PluginManager("neuroal")
    for spec in SPECS:
        manager.add_hookspecs(spec)
    for i, (listing, instance) in enumerate(zip(listings, instances, strict=True)):
        manager.register(instance, name=f"{i}:{listing.role}:{listing.name}")
    plugins = []
    for listing, instance in zip(listings, instances, strict=True):
        others = [other for other in instances if other is not instance]
        known = ROLES[listing.role].hooks
        callers = {
            hook: manager.subset_hook_caller(hook, others)
            for hook in contract.hooks(type(instance))
            if hook in known
        }
        source = _source(type(instance).__module__)
        plugins.append(
            Plugin(
                listing.role,
                listing.name,
                listing.distribution,
                listing.version,
                instance,
                source,
                _sha256(source),
                callers,
            )
        )
    return plugins


def _source(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _sha256(source: Path | None) -> str | None:
    return hashlib.sha256(source.read_bytes()).hexdigest() if source else None

"""What plugins there are: entry points, files and instances, and importing one of them.

Listing reads metadata only; nothing is imported before `module_of` or `object_of` is called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import neuroal
from neuroal.errors import PluginError, UsageError, nearest
from neuroal.hookspecs import ROLES
from neuroal.plugins import trust
from neuroal.plugins.trust import FILE, INSTANCE

TOP_UP = "top_up"
GROUPS = (*ROLES, TOP_UP)
_PREFIX = "neuroal."
_LONGEST = 300  # characters of an exception's own text in a line
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """One plugin as it was declared or given; nothing of it has been imported.

    Attributes:
        role: A role, or "top_up".
        name: Entry-point name; of a file or an undeclared instance, the class in snake_case.
        distribution: Who declares it; of a file, its path; of an instance that belongs to no
            distribution, "python".
        version: Version of the distribution, else "file" or "instance".
        value: Where the object is: `module:attribute`; of a file, `path:attribute`.
        clash: Another distribution that may load declares the same name for the same role.
        needs: What its distribution's metadata asks of neuroal where this version is none of
            those: `neuroal>=2`.
    """

    role: str
    name: str
    distribution: str
    version: str
    value: str
    clash: bool = False
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.role} '{self.name}' ({self.distribution} {self.version})"

    @property
    def qualified(self) -> str:
        """Return `distribution:name`, which no other can claim; of a file, `path:attribute`."""
        return self.value if _is_file(self) else f"{self.distribution}:{self.name}"

    @property
    def permitted(self) -> bool:
        """Return whether it may load: see `neuroal.plugins.trust`."""
        return trust.permits(self.distribution, self.version)

    @property
    def status(self) -> str:
        """Return "ok", "clash", "incompatible" or "not allowed"; only the first loads by name."""
        if not self.permitted:
            return "not allowed"
        return "incompatible" if self.needs else "clash" if self.clash else "ok"


def available(role: str | None = None) -> list[Listing]:
    """Return every installed plugin and top-up, by role, name and distribution.

    Args:
        role: Only this role; None for all five and "top_up".

    Raises:
        UsageError: There is no such role.
    """
    if role is not None and role not in GROUPS:
        raise UsageError(f"unknown role '{role}': {nearest(role, GROUPS)}")
    found: dict[tuple[int, str, str], Listing] = {}
    for distribution, version, needs, point in _declared():
        group = point.group.removeprefix(_PREFIX)
        key = (GROUPS.index(group), point.name, distribution)
        listing = Listing(group, point.name, distribution, version, point.value, needs=needs)
        found.setdefault(key, listing)
    offers = Counter((x.role, x.name) for x in found.values() if x.permitted)
    return [
        dataclasses.replace(x, clash=offers[x.role, x.name] > 1 and x.permitted)
        for _, x in sorted(found.items())
        if role in (None, x.role)
    ]


def find(name: str, role: str | None = None) -> list[Listing]:
    """Return every listing of a name or of `distribution:name`, one per role and distribution.

    Raises:
        UsageError: There is none; the message names the nearest that there is.
    """
    listings = available(role)
    distribution, _, bare = name.rpartition(":")
    found = [
        listing
        for listing in listings
        if listing.name == bare
        and (not distribution or trust.normal(listing.distribution) == trust.normal(distribution))
    ]
    if found:
        return found
    elsewhere = sorted({x.role for x in available() if x.name == bare}) if role else []
    hint = f"it is of role {' and '.join(elsewhere)}; " if elsewhere and not distribution else ""
    if "/" in name or "\\" in name:
        hint = "a file's plugin is written ./file.py:Class; "
    known = {listing.qualified if distribution else listing.name for listing in listings}
    raise UsageError(f"unknown {role or 'plugin'} '{name}': {hint}{nearest(name, known)}")


def in_file(choice: str) -> bool:
    """Return whether a choice is `./mine.py:Mine`, and not a plugin's name."""
    return ".py:" in choice or choice.endswith(".py")


def listing_of(role: str, choice: object) -> Listing:
    """Return the listing of a name, `distribution:name`, `./mine.py:Mine` or a Python instance.

    Raises:
        UsageError: There is no such plugin or file, or several distributions offer the name.
    """
    if not isinstance(choice, str):
        return _listing_of_instance(role, choice)
    if in_file(choice):
        path, _, attribute = choice.rpartition(":") if ".py:" in choice else (choice, "", "")
        if not Path(path).expanduser().is_file():
            raise UsageError(f"{role} '{choice}': there is no file {path}")
        if not attribute:
            raise UsageError(f"{role} '{choice}' names no class: write {path}:CLASS")
        return Listing(role, _snake_case(attribute.rpartition(".")[2]), path, FILE, choice)
    found = find(choice, role)
    found = [listing for listing in found if listing.permitted] or found
    if len(found) > 1:
        offers = " and ".join(f"{x.distribution} {x.version}" for x in found)
        names = " or ".join(x.qualified for x in found)
        raise UsageError(f"{role} '{choice}' is offered by {offers}: write {names}")
    return found[0]


def module_of(listing: Listing) -> ModuleType:
    """Import the module of a listing.

    Raises:
        UsageError: It may not load.
        PluginError: It does not import, whatever the reason, or is for another neuroal.
    """
    refuse(listing)
    module = _target(listing)[0]
    try:
        return _run_file(module) if _is_file(listing) else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise _import_error(listing, error) from error


def object_of(listing: Listing) -> Any:
    """Import the object that a listing names.

    Raises:
        PluginError: It does not import, or is not there.
    """
    module = module_of(listing)
    found: Any = module
    for part in filter(None, _target(listing)[1].split(".")):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [name for name, value in vars(module).items() if isinstance(value, type)]
            cure = nearest(part, names)
            raise PluginError(f"{listing}: there is no {listing.value}: {cure}") from None
        except Exception as error:  # a module that imports lazily
            raise _import_error(listing, error) from error
    return found


def refuse(listing: Listing) -> None:
    """Refuse a plugin that may not load, or that is for another version of neuroal.

    Raises:
        UsageError: Its distribution is not among the allowed ones.
        PluginError: Its distribution asks for another version of neuroal.
    """
    problem = trust.refusal(listing.distribution, listing.version)
    if problem:
        raise UsageError(f"{listing}: {problem}")
    if listing.needs:
        raise PluginError(
            f"{listing}: needs {listing.needs}, and this is {neuroal.__version__}: install a "
            f"neuroal that fits, or another version of {listing.distribution}"
        )


def one_line(error: BaseException) -> str:
    """Return an exception's type and text on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_LONGEST]}" if words else type(error).__name__


_Declared = tuple[str, str, str, importlib.metadata.EntryPoint]


def _declared() -> tuple[_Declared, ...]:
    """Return what is installed: distribution, version, what it needs, entry point."""
    return _declared_on(tuple(map(_dated, sys.path)))


def _dated(place: str) -> tuple[str, int]:
    try:
        return place, os.stat(place or ".").st_mtime_ns  # changes where one is installed
    except OSError:
        return place, 0


@lru_cache(maxsize=1)  # a run asks dozens of times, and each would read every installed file list
def _declared_on(path: tuple[tuple[str, int], ...]) -> tuple[_Declared, ...]:
    return tuple(_read_declared())


def _read_declared() -> Iterator[_Declared]:
    seen = set()  # the first on the path hides the others, as for imports
    groups = {_PREFIX + group for group in GROUPS}
    for found in importlib.metadata.distributions():
        try:
            if f"[{_PREFIX}" not in (found.read_text("entry_points.txt") or ""):
                continue
            name, version, points = found.name, found.version, list(found.entry_points)
            key, needs = trust.normal(name), trust.unmet(found.requires or ())
        except Exception as error:  # one damaged installation does not hide the others
            log.warning("a distribution's metadata cannot be read: %s", one_line(error))
            continue
        if key not in seen:
            seen.add(key)
            yield from ((name, version, needs, p) for p in points if p.group in groups)


def _listing_of_instance(role: str, choice: object) -> Listing:
    kind = type(choice)
    if isinstance(choice, type):
        name = choice.__name__
        raise UsageError(f"{role} {name} is a class: give a name or an instance, {name}()")
    own = (kind.__module__, kind.__qualname__)
    for listing in available(role):
        module, attribute = _target(listing)
        loaded = vars(sys.modules[module]) if module in sys.modules else {}
        if own == (module, attribute) or loaded.get(attribute) is kind:
            return listing
    package, name = kind.__module__.partition(".")[0], _snake_case(kind.__name__)
    for distribution in _packages(tuple(sys.path)).get(package, []):
        version = importlib.metadata.version(distribution)
        return Listing(role, name, distribution, version, ":".join(own))
    return Listing(role, name, "python", INSTANCE, ":".join(own))


@cache  # reads every installed file list: a fifth of a second
def _packages(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _is_file(listing: Listing) -> bool:
    return listing.version == FILE


def _target(listing: Listing) -> tuple[str, str]:
    if _is_file(listing):
        path, _, attribute = listing.value.rpartition(":")
        return path, attribute
    module, _, attribute = listing.value.partition("[")[0].partition(":")  # module:object [extra]
    return module.strip(), attribute.strip()


def _import_error(listing: Listing, error: BaseException) -> PluginError:
    cure = "correct it" if _is_file(listing) else f"upgrade or uninstall {listing.distribution}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = f"{_target(listing)[0]}.".startswith(f"{error.name}.")  # its own module
        cure = f"reinstall {listing.distribution}" if missing else f"install {error.name}"
    return PluginError(f"{listing}: does not import: {one_line(error)}: {cure}")


def file_sha256(listing: Listing) -> str:
    """Return the SHA-256 of the file of a `./mine.py:Mine`, which does not run."""
    return hashlib.sha256(Path(_target(listing)[0]).expanduser().read_bytes()).hexdigest()


def _run_file(name: str) -> ModuleType:
    # A module of its own for each content of each file: an edited file is a new module.
    path = Path(name).expanduser().resolve()
    source = path.read_bytes()
    key = f"neuroal_file_{hashlib.sha256(bytes(path) + source).hexdigest()}"
    if key not in sys.modules:
        module = ModuleType(key)
        module.__file__ = str(path)
        sys.modules[key] = module  # dataclasses and typing look it up there
        try:
            exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]

"""Whose plugins may load: an allow-list of distributions, and versions that fit together.

`NEUROAL_ONLY_PLUGINS`, or `neuroal --only-plugins`, names distributions, separated by commas.
neuroal's own plugins always may load. `./` allows plugins from files, and `python` instances of
classes that belong to no distribution; no distribution can have the first name, and the second
never means one.

A file of code is the user's choice, too, not that of a recipe or study that names one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import neuroal
from neuroal.errors import UsageError

ENVIRONMENT = "NEUROAL_ONLY_PLUGINS"
OWN = "neuroal"
FILES = "./"
INSTANCES = "python"
ALLOW = "--allow-plugin-files"
FILE, INSTANCE = "file", "instance"  # what stands for the version of what has none
_OWN = re.compile(rf"{OWN}(?![-_.\w])", re.IGNORECASE)
_PLAIN = re.compile(rf"{OWN}(>=(?P<least>\d+(\.\d+)*))?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def normal(distribution: str) -> str:
    """Return the one spelling that all spellings of a distribution's name have in common."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def allowed() -> frozenset[str] | None:
    """Return what the environment allows to load; None where it does not restrict it."""
    names = _split(os.environ.get(ENVIRONMENT, ""))
    return frozenset(normal(name) if name != FILES else name for name in names) or None


@contextmanager
def only(names: str) -> Iterator[None]:
    """Allow only these distributions, separated by commas, in this process and its children.

    Raises:
        UsageError: There is no name, or one that no distribution can have.
    """
    wrong = [n for n in _split(names) if n != FILES and not _NAME.fullmatch(n)]
    if wrong or not _split(names):
        said = f"'{wrong[0]}' is no name of a distribution" if wrong else "no distribution is named"
        raise UsageError(f"{said}: write DIST,..., and {FILES} for plugins from files")
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = names
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def permits(distribution: str, version: str) -> bool:
    """Return whether a plugin of this distribution, a file or an instance may load."""
    names = allowed()
    if names is None:
        return True
    if version == FILE:
        return FILES in names
    if version == INSTANCE:
        return INSTANCES in names
    return normal(distribution) in (names - {INSTANCES}) | {OWN}


def refusal(distribution: str, version: str) -> str | None:
    """Return why a plugin may not load, as half a sentence that ends in the cure, or None."""
    if permits(distribution, version):
        return None
    token = {FILE: FILES, INSTANCE: INSTANCES}.get(version, distribution)
    names = ", ".join(sorted((allowed() or frozenset()) | {OWN}))
    return f"may not load: only {names} may (--only-plugins, {ENVIRONMENT}): add {token}"


def refuse_code_of(file: str, named: Iterable[str]) -> None:
    """Refuse to run code that a recipe or study names, and the user has not.

    Args:
        file: The recipe or study.
        named: Plugin files that it names, or folders of task definitions.

    Raises:
        UsageError: There is one.
    """
    for name in named:
        raise UsageError(
            f"'{file}' names '{name}', whose code would run: read it, then add {ALLOW}"
        )


def unmet(requires: Iterable[str]) -> str:
    """Return what a distribution's metadata asks of neuroal and does not get; "" if all is met.

    Args:
        requires: Its `Requires-Dist`; what concerns other distributions is pip's affair.
    """
    for text in filter(_OWN.match, requires):
        if _plainly_met(text):
            continue
        # As pip reads it: ~=, pre-releases and markers are no matter for a comparison by hand.
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # pip installed it all the same
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(neuroal.__version__, prereleases=True):
            return f"{OWN}{requirement.specifier}"
    return ""


def _plainly_met(text: str) -> bool:
    """Return whether it is `neuroal` or `neuroal>=1.2`, and met: as most are, read in no time."""
    asked = _PLAIN.fullmatch(text.strip())
    if asked is None or not re.fullmatch(r"\d+(\.\d+)*", neuroal.__version__):
        return False
    least = [int(n) for n in asked["least"].split(".")] if asked["least"] else []
    return [int(n) for n in neuroal.__version__.split(".")] >= least


def check_requirements(requires: Iterable[str]) -> None:
    """Refuse to go on unless every required distribution is installed, in a version that fits.

    Args:
        requires: Requirements as pip reads them: `neuroal-nowag>=0.1`.

    Raises:
        UsageError: One is malformed, missing or of another version.
    """
    for text in requires:
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            raise UsageError(
                f"requirement '{text}' is malformed: write distribution>=version"
            ) from None
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            found = f"{version} is installed" if version else "it is not installed"
            raise UsageError(f"the recipe requires {text}, and {found}: pip install '{text}'")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]

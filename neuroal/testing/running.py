"""The checks without a test runner: the first thing that is wrong with every installed plugin."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import SkipTest

from neuroal.errors import NeuroalError
from neuroal.plugins import Listing, Plugin, available, load, load_top_up
from neuroal.plugins.listing import TOP_UP, one_line
from neuroal.testing.alignment import AlignmentConformance
from neuroal.testing.checks import Conformance
from neuroal.testing.exporter import ExporterConformance
from neuroal.testing.pruner import PrunerConformance
from neuroal.testing.ratios import BlockRatiosConformance
from neuroal.testing.reconstruction import ReconstructionConformance
from neuroal.testing.refiner import RefinerConformance
from neuroal.testing.row_ratios import RowRatiosConformance
from neuroal.types import TopUp

CLASSES: dict[str, type[Conformance]] = {
    kind.role: kind
    for kind in (
        PrunerConformance,
        BlockRatiosConformance,
        RowRatiosConformance,
        AlignmentConformance,
        RefinerConformance,
        ReconstructionConformance,
        ExporterConformance,
    )
}


def failures(plugin: Plugin, checks: Conformance | None = None) -> Iterator[tuple[str, str]]:
    """Yield the name of every check that a plugin fails, and what was wrong, on one line.

    `checks` is an instance of its role's class; by default one that leaves out what takes long.
    """
    if checks is None:
        checks = CLASSES[plugin.role]()
        checks.quick = True
    for name in dir(checks):
        if not name.startswith("test_"):
            continue
        try:
            getattr(checks, name)(plugin)
        except SkipTest:
            continue
        except (AssertionError, NeuroalError) as error:
            yield name, " ".join(str(error).split())
        except Exception as error:
            yield name, one_line(error)


def check_installed(listings: Sequence[Listing] | None = None) -> Iterator[tuple[Listing, str]]:
    """Load plugins, by default all installed ones and top-ups, and run the quick checks.

    Yields:
        Each with what was wrong first, on one line that names the plugin; "" if nothing was.
    """
    for listing in available() if listings is None else listings:
        try:
            if listing.role == TOP_UP:
                _check_top_up(load_top_up(listing.qualified))
                yield listing, ""
                continue
            plugin = load([(listing.role, listing.qualified)])[0]
        except NeuroalError as error:
            said = str(error)
            yield listing, said if said.startswith(str(listing)) else f"{listing}: {said}"
            continue
        with _quiet():
            name, said = next(failures(plugin), ("", ""))
        if said and not said.startswith(plugin.label):
            said = f"{plugin.label}: {said}"
        yield listing, f"{said} [{name}]" if said else ""


def _check_top_up(top_up: TopUp) -> None:
    """Load the plugins that a preset names, with its options."""
    names = [("block_ratios", name) for name in top_up.block_ratios]
    names += [("row_ratios", top_up.row_ratios), ("alignment", top_up.alignment)]
    for role in ("pruner", "refiner", "reconstruction"):
        if getattr(top_up, role) is not None:
            names.append((role, getattr(top_up, role)))
    load(names, top_up.options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what plugins warn of in made-up situations to ourselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

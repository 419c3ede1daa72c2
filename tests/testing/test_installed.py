"""Every installed plugin, neuroal's own among them, passes the checks of its role."""

from __future__ import annotations

from typing import Any

import pytest

from neuroal.hookspecs import ROLES
from neuroal.plugins import Listing, Plugin, available, load
from neuroal.testing import (
    AlignmentConformance,
    BlockRatiosConformance,
    ExporterConformance,
    PrunerConformance,
    ReconstructionConformance,
    RefinerConformance,
    RowRatiosConformance,
)


def installed(role: str) -> Any:
    """A fixture that is every installed plugin of a role, one after the other."""
    listings = available(role)

    @pytest.fixture(params=listings, ids=[x.qualified for x in listings])
    def plugin(_: Any, request: pytest.FixtureRequest) -> Plugin:
        listing: Listing = request.param
        return load([(listing.role, listing.qualified)])[0]

    return plugin


class TestPruner(PrunerConformance):
    plugin = installed("pruner")


class TestBlockRatios(BlockRatiosConformance):
    plugin = installed("block_ratios")


class TestRowRatios(RowRatiosConformance):
    plugin = installed("row_ratios")


class TestAlignment(AlignmentConformance):
    plugin = installed("alignment")


class TestRefiner(RefinerConformance):
    plugin = installed("refiner")


class TestReconstruction(ReconstructionConformance):
    plugin = installed("reconstruction")


class TestExporter(ExporterConformance):
    plugin = installed("exporter")


def test_every_role_is_checked() -> None:
    ratios = {TestBlockRatios, TestRowRatios}
    checked = {TestPruner, *ratios, TestAlignment, TestRefiner, TestReconstruction, TestExporter}
    assert {kind.role for kind in checked} == set(ROLES)

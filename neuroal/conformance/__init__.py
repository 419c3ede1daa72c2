"""What every plugin of a role has to hold to, as test classes: one fixture, and pytest runs them.

    class TestMine(PrunerConformance):
        @pytest.fixture
        def plugin(self):
            return Mine()

`neuroal plugins check` runs the same checks in-process. Nothing here imports pytest.
"""

from neuroal.conformance.alignment import AlignmentConformance
from neuroal.conformance.pruner import PrunerConformance
from neuroal.conformance.ratios import BlockRatiosConformance, RowRatiosConformance
from neuroal.conformance.refiner import RefinerConformance
from neuroal.conformance.running import CLASSES, check_installed, failures

__all__ = [
    "CLASSES",
    "AlignmentConformance",
    "BlockRatiosConformance",
    "PrunerConformance",
    "RefinerConformance",
    "RowRatiosConformance",
    "check_installed",
    "failures",
]

"""What the tests of a plugin need: tiny models, hand-made data, and the checks of every role.

The checks of a role are a test class: a subclass has one fixture, and pytest runs the rest.

    class TestMine(PrunerConformance):
        @pytest.fixture
        def plugin(self):
            return Mine()

`neuroal plugins check` runs the same checks in-process. Nothing here imports pytest.
"""

from neuroal.testing.alignment import AlignmentConformance
from neuroal.testing.exporter import ExporterConformance
from neuroal.testing.finished_run import finished_run
from neuroal.testing.models import (
    CONTEXT,
    END_TOKEN,
    STRUCTURES,
    VOCABULARY,
    collect,
    layout,
    linear,
    statistics,
    tiny_model,
    tiny_tokenizer,
    windows,
)
from neuroal.testing.pruner import PrunerConformance
from neuroal.testing.ratios import BlockRatiosConformance
from neuroal.testing.reconstruction import ReconstructionConformance
from neuroal.testing.refiner import RefinerConformance
from neuroal.testing.row_ratios import RowRatiosConformance
from neuroal.testing.running import CLASSES, check_installed, failures

__all__ = [
    "CLASSES",
    "CONTEXT",
    "END_TOKEN",
    "STRUCTURES",
    "VOCABULARY",
    "AlignmentConformance",
    "BlockRatiosConformance",
    "ExporterConformance",
    "PrunerConformance",
    "ReconstructionConformance",
    "RefinerConformance",
    "RowRatiosConformance",
    "check_installed",
    "collect",
    "failures",
    "finished_run",
    "layout",
    "linear",
    "statistics",
    "tiny_model",
    "tiny_tokenizer",
    "windows",
]

"""neuroal: one-shot pruning of language models, with plugins, around NeuroAL.

The public names load on first use, so that `import neuroal` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from neuroal.model import registration
from neuroal.version import __version__

if TYPE_CHECKING:
    from neuroal import layout as layout
    from neuroal.engine import prune
    from neuroal.errors import NeuroalError, PluginError, UsageError
    from neuroal.evaluation.compare import compare
    from neuroal.evaluation.evaluate import evaluate
    from neuroal.hookspecs import hookimpl
    from neuroal.layout import Block, Layout, Linear
    from neuroal.options import option
    from neuroal.pruning.budget import largest_remainder, project
    from neuroal.pruning.masks import mask_for, row_mask
    from neuroal.recipe import Recipe
    from neuroal.run.apply import apply
    from neuroal.run.pack import pack, unpack
    from neuroal.run.report import Report
    from neuroal.types import (
        Accumulator,
        BlockBatch,
        BlockRatiosTraits,
        ExporterTraits,
        Generation,
        Importance,
        LinearToExport,
        Measurement,
        Pattern,
        Proposal,
        PrunedLinear,
        PrunerTraits,
        ReconstructionTraits,
        RefinerTraits,
        RowRatiosTraits,
        RunToExport,
        Target,
        TopUp,
    )
    from neuroal.walk.statistics import Statistics

_HOME = {
    "Accumulator": "types",
    "Block": "layout",
    "BlockBatch": "types",
    "BlockRatiosTraits": "types",
    "ExporterTraits": "types",
    "Generation": "types",
    "Importance": "types",
    "Layout": "layout",
    "Linear": "layout",
    "LinearToExport": "types",
    "Measurement": "types",
    "NeuroalError": "errors",
    "Pattern": "types",
    "PluginError": "errors",
    "Proposal": "types",
    "PrunedLinear": "types",
    "PrunerTraits": "types",
    "Recipe": "recipe",
    "ReconstructionTraits": "types",
    "RefinerTraits": "types",
    "Report": "run.report",
    "RowRatiosTraits": "types",
    "RunToExport": "types",
    "Statistics": "walk.statistics",
    "Target": "types",
    "TopUp": "types",
    "UsageError": "errors",
    "apply": "run.apply",
    "compare": "evaluation.compare",
    "evaluate": "evaluation.evaluate",
    "hookimpl": "hookspecs",
    "largest_remainder": "pruning.budget",
    "mask_for": "pruning.masks",
    "option": "options",
    "pack": "run.pack",
    "project": "pruning.budget",
    "prune": "engine",
    "row_mask": "pruning.masks",
    "unpack": "run.pack",
}
__all__ = [
    "Accumulator",
    "Block",
    "BlockBatch",
    "BlockRatiosTraits",
    "ExporterTraits",
    "Generation",
    "Importance",
    "Layout",
    "Linear",
    "LinearToExport",
    "Measurement",
    "NeuroalError",
    "Pattern",
    "PluginError",
    "Proposal",
    "PrunedLinear",
    "PrunerTraits",
    "Recipe",
    "ReconstructionTraits",
    "RefinerTraits",
    "Report",
    "RowRatiosTraits",
    "RunToExport",
    "Statistics",
    "Target",
    "TopUp",
    "UsageError",
    "__version__",
    "apply",
    "compare",
    "evaluate",
    "hookimpl",
    "largest_remainder",
    "layout",
    "mask_for",
    "option",
    "pack",
    "project",
    "prune",
    "row_mask",
    "unpack",
]

registration.register()


def __getattr__(name: str) -> Any:
    if name == "layout":  # a room that can be called
        return importlib.import_module("neuroal.layout")
    if name not in _HOME:
        raise AttributeError(f"module 'neuroal' has no attribute '{name}'")
    return getattr(importlib.import_module(f"neuroal.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""neuroal: one-shot pruning of language models, with plugins, around NeuroAL.

The public names load on first use, so that `import neuroal` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neuroal.engine import prune
    from neuroal.errors import NeuroalError, PluginError, UsageError
    from neuroal.hookspecs import (
        Accumulator,
        Generation,
        Measurement,
        Pattern,
        Proposal,
        PrunedLinear,
        PrunerTraits,
        Target,
        TopUp,
        hookimpl,
    )
    from neuroal.layout import Block, Layout, Linear
    from neuroal.masks import mask_for, row_mask
    from neuroal.options import option
    from neuroal.recipe import Recipe
    from neuroal.result import Report
    from neuroal.statistics import Statistics

_HOME = {
    "Accumulator": "hookspecs",
    "Block": "layout",
    "Generation": "hookspecs",
    "Layout": "layout",
    "Linear": "layout",
    "Measurement": "hookspecs",
    "NeuroalError": "errors",
    "Pattern": "hookspecs",
    "PluginError": "errors",
    "Proposal": "hookspecs",
    "PrunedLinear": "hookspecs",
    "PrunerTraits": "hookspecs",
    "Recipe": "recipe",
    "Report": "result",
    "Statistics": "statistics",
    "Target": "hookspecs",
    "TopUp": "hookspecs",
    "UsageError": "errors",
    "hookimpl": "hookspecs",
    "mask_for": "masks",
    "option": "options",
    "prune": "engine",
    "row_mask": "masks",
}
__all__ = [
    "Accumulator",
    "Block",
    "Generation",
    "Layout",
    "Linear",
    "Measurement",
    "NeuroalError",
    "Pattern",
    "PluginError",
    "Proposal",
    "PrunedLinear",
    "PrunerTraits",
    "Recipe",
    "Report",
    "Statistics",
    "Target",
    "TopUp",
    "UsageError",
    "__version__",
    "hookimpl",
    "mask_for",
    "option",
    "prune",
    "row_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuroal' has no attribute '{name}'")
    return getattr(importlib.import_module(f"neuroal.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

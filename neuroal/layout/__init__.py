"""A model's blocks, linears and consumers, found by structure and execution.

`find` looks for the lists of decoder blocks, runs the model once on a few tokens (or on meta
tensors, without weights) and reads from that run which matrices multiply, which of them see the
same input and in which order they run. It looks at no family name.

parts     `Layout`, `Block`, `Linear`, `Place`: what a model is made of
finding   `find`: from the trace to the layout
trace     the one run: which blocks run, and which matrices multiply in them
flow      follows the outputs of linears through that run
flows     what a linear's rows are (q, k, v, gate, up), and which columns they become
experts   matrices that tokens are routed to
selection which linears a pattern means: a name, a glob, `first:2`, `attention`
matrices  where matrices lie in the model's parameters: read, replace, write, watch
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from neuroal.layout.finding import find
from neuroal.layout.parts import Block, Fed, Layout, Linear, Rows, SkippedWeight
from neuroal.layout.selection import kept_linears, selected
from neuroal.layout.trace import TRACE_TOKENS

__all__ = [
    "TRACE_TOKENS",
    "Block",
    "Fed",
    "Layout",
    "Linear",
    "Rows",
    "SkippedWeight",
    "find",
    "kept_linears",
    "selected",
]


class _Room(ModuleType):
    """A room of which one function is public under the room's own name: `neuroal.layout(model)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Layout:
        """Return the layout of a model; found by name, as `neuroal` finds its public names."""
        found: Layout = importlib.import_module("neuroal.model.structure").layout(
            *arguments, **options
        )
        return found


sys.modules[__name__].__class__ = _Room

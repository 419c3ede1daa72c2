"""Model to blocks, linears and consumers, found by structure and execution.

`find` looks for the lists of decoder blocks, runs the model once on a few tokens (or on meta
tensors, without weights) and reads from that run which matrices multiply, which of them see the
same input and in which order they run. No family name is looked at.
"""

from neuroal.layout.finding import find
from neuroal.layout.parts import Block, Fed, Layout, Linear, Rows, SkippedWeight
from neuroal.layout.trace import TRACE_TOKENS

__all__ = ["TRACE_TOKENS", "Block", "Fed", "Layout", "Linear", "Rows", "SkippedWeight", "find"]

"""What goes through the blocks: calibration windows, and the state of each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuroal.distributed import ALONE, Team
from neuroal.walk.activations import Store
from neuroal.walk.statistics import Statistics
from neuroal.walk.stubs import BlockCall, BlockOutputs, OutputKey

LinearStatistics = dict[str, Statistics]
GroupInputs = dict[int, list[Tensor]]
"""Inputs `(windows, tokens, in)` of every group, one for every time the group ran."""
Tree = TypeVar("Tree")


@dataclass
class CandidateState:
    """The state of one candidate between two blocks.

    Attributes:
        outputs: Per batch, what its blocks returned that a later block, or the head, reads: the
            hidden state `(windows, tokens, hidden)`, and whatever else the model passes on.
        weights: By name, its pruned parameters that a later block shares or whose block runs again.
    """

    outputs: Store[BlockOutputs]
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, inputs: Inputs) -> CandidateState:
        """Return the state before the first block, where no block has returned anything."""
        return cls([{} for _ in inputs.batches])


@dataclass(frozen=True)
class Inputs:
    """Calibration windows, ready to walk.

    Attributes:
        batches: Token ids `(windows, length)`, in window order.
        calls: For every block, the arguments that the model passes to it, per batch.
        windows: Number of windows.
        last_use: For every block output, the index of the last block that reads it; the number of
            blocks where the model reads it after all of them.
        team: The processes that share the windows; statistics are over all windows.
        dtype: In which the blocks run; None is the model's own.
    """

    batches: tuple[Tensor, ...]
    calls: tuple[Store[BlockCall], ...]
    windows: int
    last_use: Mapping[OutputKey, int]
    team: Team = ALONE
    dtype: torch.dtype | None = None


@dataclass
class BlockRun:
    """The result of running one block on one state.

    Attributes:
        statistics: By linear name; linears that share an input share the object.
        state: The state after the block; None where the block's output was not asked for.
        inputs: Group inputs per batch, kept for accumulators that compare; else empty.
    """

    statistics: LinearStatistics
    state: CandidateState | None
    inputs: Store[GroupInputs] = field(default_factory=list)


def cast_tree(tree: Tree, dtype: torch.dtype) -> Tree:
    """Return a tree with its floating tensors in another dtype, clamped to its range."""
    limits = torch.finfo(dtype)  # masks hold the lowest number of their own dtype

    def cast(x: object) -> object:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if limits.max < torch.finfo(x.dtype).max:
            x = x.clamp(limits.min, limits.max)
        return x.to(dtype)

    return pytree.tree_map(cast, tree)  # type: ignore[no-any-return]

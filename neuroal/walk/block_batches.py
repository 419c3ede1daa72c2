"""A pruned block as a function of its weights, batch by batch, beside the dense model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor, nn

from neuroal.layout import Block
from neuroal.walk.states import CandidateState, Inputs
from neuroal.walk.walker import Walker


@dataclass(frozen=True, eq=False)
class Batch:
    """A `BlockBatch`: some windows in front of a block, and what the dense model has behind it."""

    of: BlockBatches
    index: int

    @property
    def windows(self) -> int:
        """Return the number of windows."""
        return len(self.of.inputs.batches[self.index])

    @property
    def target(self) -> Tensor:
        """Return the dense model's output, float32 `(windows, tokens, hidden)`."""
        outputs = self.of.after.outputs[self.index]
        return self.of.walker.hidden(self.of.block, self.of.inputs, outputs).float()

    def run(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the block's output with these weights, float32 `(windows, tokens, hidden)`."""
        return self.of.walker.differentiable(
            self.of.block,
            self.of.module,
            self.of.inputs,
            self.of.state,
            self.index,
            {**self.of.weights, **weights},
        )


@dataclass(frozen=True, eq=False)
class BlockBatches(Sequence[Batch]):
    """All batches of the calibration windows in front of a block.

    Attributes:
        walker: Runs the block.
        block: The block.
        module: Its module in float32.
        inputs: The windows.
        state: Of the pruned model, before the block.
        after: Of the dense model, after it.
        weights: float32 `(out, in)` by linear name, where a run is given none.
    """

    walker: Walker
    block: Block
    module: nn.Module
    inputs: Inputs
    state: CandidateState
    after: CandidateState
    weights: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [Batch(self, i) for i in range(len(self))[index]]
        return Batch(self, range(len(self))[index])

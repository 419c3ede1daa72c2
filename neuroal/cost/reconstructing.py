"""How long the reconstruction of a block takes: its runs on few tokens or more, and its solving."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuroal.cost.probes import corner_statistics, synchronised
from neuroal.layout import Block, Layout, matrices
from neuroal.plugins import Plugin
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.targets import Rules, targets
from neuroal.run.reconstruction import Reconstruction, batch_windows, stages
from neuroal.types import Target
from neuroal.walk import BlockRun, CandidateState, Walker
from neuroal.walk.states import LinearStatistics

Seconds = dict[str, float]


@dataclass(eq=False)
class Reconstructions:
    """Reconstructions of the block, timed; masks keep every other column of its matrices.

    Attributes:
        statistics: What the last runs collected for every linear.
    """

    plugin: Plugin
    walker: Walker
    seed: int
    rules: Rules
    device: str
    statistics: LinearStatistics = field(default_factory=dict)

    def runs(self, windows: int, length: int) -> Seconds:
        """Return the seconds of every kind of run on so many windows of so many tokens."""
        (block,), rng = self.walker.layout.blocks, torch.Generator().manual_seed(0)
        module, seconds = self.walker.module(block), synchronised(self.device)
        embeddings: Any = self.walker.model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.randint(embeddings.weight.shape[0], (windows, length), generator=rng)
        weights = {name: w.clone() for name, w in self._weights(block).items()}
        for weight in weights.values():
            weight[:, ::2] = 0
        few = batch_windows(self.plugin, windows, length)
        inputs = self.walker.inputs(ids[:few], batch=few)
        new = Reconstruction(self.plugin, self.walker, inputs, self.seed)
        state = CandidateState.start(inputs)
        share = windows / few
        found: list[BlockRun] = []

        spent: Seconds = {}
        if new.reads_dense:
            own = seconds(lambda: found.append(new.dense_run(block, module, state)))
            spent["own"] = share * own
        dense = found[0] if found else None
        if self.plugin.has("reconstruct_linear"):
            steps = stages(block)

            def read() -> None:
                for stage in steps:
                    known = new.statistics(block, module, state, dense, stage, weights)
                    self.statistics |= known

            spent["stage"] = share * seconds(read) / len(steps)
        if self.plugin.has("reconstruct_block") and dense is not None and dense.state is not None:
            leaves = {name: w.float().requires_grad_(True) for name, w in weights.items()}
            batch = new.batches(block, module, state, dense.state, leaves)[0]

            def differentiate() -> None:
                loss = (batch.run(leaves) - batch.target).square().mean()
                torch.autograd.grad(loss, list(leaves.values()))

            with torch.enable_grad():
                spent["differentiate"] = share * seconds(differentiate)
        return spent

    def solve(self, block: Block) -> Seconds:
        """Return the seconds in which the linears of a corner get new values."""
        layout, module = self.walker.layout, self.walker.module(block)
        weights = self._weights(block)
        masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
        for mask in masks.values():
            mask[:, ::2] = True
        values = {name: weight.masked_fill(masks[name], 0) for name, weight in weights.items()}
        inputs = self.walker.inputs(torch.zeros(1, 1, dtype=torch.int64))
        new = Reconstruction(self.plugin, self.walker, inputs, self.seed)
        seen = corner_statistics(block, self.statistics, layout)
        linears = [x for x in block.linears if x.name in weights]
        goals = uniform_targets(Layout((block,)), self.rules)
        work = partial(new.linears, block, module, linears, values, masks, goals, seen)
        return {"reconstruct": synchronised(self.device)(work)}

    def _weights(self, block: Block) -> dict[str, Tensor]:
        """Return views of the weights of a block's, or a corner's, linears that are pruned."""
        module, goals = self.walker.module(block), uniform_targets(self.walker.layout, self.rules)
        return {
            x.name: matrices.weight(x, module, block.name) for x in block.linears if x.name in goals
        }


def uniform_targets(layout: Layout, rules: Rules) -> dict[str, Target]:
    """Return what the linears of a block are pruned for, by uniform ratios."""
    ratios = dict.fromkeys(layout.linears, rules.sparsity)
    return dict(targets(Allocation.of(ratios, layout), layout, rules))

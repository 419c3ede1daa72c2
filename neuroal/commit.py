"""The final pruning: block by block, on what the pruned blocks before it produce."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neuroal import weights as matrices
from neuroal.alignment import Tick
from neuroal.hookspecs import Target
from neuroal.layout import Block, Layout
from neuroal.output import Journal
from neuroal.pruning import BasePruner, spare_copies
from neuroal.result import InputNorms
from neuroal.statistics import Statistics, resolve
from neuroal.walk import Prefix, Walker


def commit(
    model: nn.Module,
    layout: Layout,
    base: BasePruner,
    targets: Mapping[str, Target],
    walker: Walker | None,
    ids: Tensor | None,
    journal: Journal,
    tick: Tick,
) -> dict[str, InputNorms]:
    """Prune a model for good; a block that the journal knows is taken from there.

    Every block runs dense for the statistics, is pruned, and runs pruned: that output is the next
    block's input. Nothing runs if neither pruner nor refiner reads statistics.

    Args:
        model: Pruned in place.
        layout: Its layout.
        base: Pruner and refiner.
        targets: How much to prune in every linear; those without one stay dense.
        walker: Runs the model; None without calibration data.
        ids: Calibration windows, int64 `(windows, length)`.
        journal: Finished blocks of an earlier try, and a place for new ones.
        tick: Called once per block.

    Returns:
        The mean input norm of every linear, with its block dense and with its block pruned; empty
        where no block runs. Pruned is None in the last block, which does not run pruned.
    """
    plugins = [p for p in (base.pruner, base.refiner) if p is not None]
    accumulators = resolve(s for p in plugins for s in p.required_statistics())
    if not accumulators or walker is None or ids is None:
        for block in layout.blocks:
            _prune(block, model.get_submodule(block.name), base, targets, {}, journal)
            tick()
        return {}
    read = {a.name for a in accumulators}
    accumulators = resolve({*accumulators, "input_norm"})
    norm = [a for a in accumulators if a.name == "input_norm"]
    norms: dict[str, InputNorms] = {}
    inputs = walker.inputs(ids)
    prefix = Prefix.start(inputs)
    for block in layout.blocks:
        with walker.block(block) as module:
            statistics: Mapping[str, Statistics] = {}
            before = journal.norms(block.index)
            if not journal.has_block(block.index):
                dense = walker.run(block, module, inputs, prefix, accumulators, output=False)
                statistics = {n: s.only(read) for n, s in dense.statistics.items()}
                before = _mean_norms(dense.statistics)
                journal.keep_norms(block.index, before)
            _prune(block, module, base, targets, statistics, journal)
            behind: Mapping[str, float] = {}
            if block.index < len(layout.blocks) - 1:
                after = walker.run(block, module, inputs, prefix, norm)
                prefix, behind = after.prefix or prefix, _mean_norms(after.statistics)
        norms |= {n: {"dense": x, "pruned": behind.get(n)} for n, x in before.items()}
        tick()
    return norms


def _mean_norms(statistics: Mapping[str, Statistics]) -> dict[str, float]:
    """Return the mean over inputs of `input_norm` by linear; waits for the device once."""
    means = torch.stack([s["input_norm"].float().mean() for s in statistics.values()])
    return dict(zip(statistics, means.tolist(), strict=True))


def _prune(
    block: Block,
    module: nn.Module,
    base: BasePruner,
    targets: Mapping[str, Target],
    statistics: Mapping[str, Statistics],
    journal: Journal,
) -> None:
    """Write a block's pruned weights into its module, from the journal if it has them."""
    weights = journal.block(block.index)
    if weights is None:
        copies = spare_copies(block, module)
        weights = base.prune_block(block, module, copies, statistics, targets)
        journal.keep_block(block.index, weights)
    matrices.write({x.name: x for x in block.linears}, weights, module, block.name)

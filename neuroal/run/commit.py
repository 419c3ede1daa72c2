"""The final pruning: block by block, on what the pruned blocks before it produce."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from neuroal.distributed import ALONE, Team
from neuroal.layout import Block, matrices
from neuroal.model.blocks import Blocks
from neuroal.model.run_folder import Journal
from neuroal.plugins import Plugin
from neuroal.pruning.hooks import updates_weights
from neuroal.pruning.pruner import BasePruner, ScoreCache
from neuroal.run.marks import bookmark
from neuroal.run.reconstruction import Reconstruction, batch_windows
from neuroal.run.report import InputNorms
from neuroal.types import Target, Tick
from neuroal.walk import CandidateState, Walker, batch_size
from neuroal.walk.statistics import Statistics, resolve


def commit(
    blocks: Blocks,
    base: BasePruner,
    targets: Mapping[str, Target],
    walker: Walker | None,
    ids: Tensor | None,
    journal: Journal,
    tick: Tick,
    team: Team = ALONE,
    reconstruction: Plugin | None = None,
) -> dict[str, InputNorms]:
    """Prune a model for good; a block that an earlier try finished is taken from there.

    Every block runs dense for the statistics, is pruned, and runs pruned: that output is the next
    block's input. Between the two, a reconstruction gives its surviving weights new values; the
    dense model walks beside the pruned one if it reads that. Nothing runs if neither pruner nor
    refiner reads statistics and there is no reconstruction.

    Args:
        blocks: The model's blocks.
        base: Pruner and refiner.
        targets: How much to prune in every linear; those without one stay dense.
        walker: Runs the model; None without calibration data.
        ids: Calibration windows, int64 `(windows, length)`.
        journal: Finished blocks of an earlier try, and a place for new ones.
        tick: Called once per block.
        team: The processes that share the windows, and the linears of every block.
        reconstruction: Gives surviving weights new values; None leaves them.

    Returns:
        The mean input norm of every linear, with its block dense and with its block pruned; empty
        where no block runs. Pruned is None in the last block, which does not run pruned.
    """
    plugins = [p for p in (base.pruner, base.refiner) if p is not None]
    accumulators = resolve(s for p in plugins for s in p.required_statistics())
    idle = not accumulators and reconstruction is None
    if idle or walker is None or ids is None:
        for block in blocks.layout.blocks:
            with blocks.open(block) as module:
                if not restore(blocks, block, module, journal, team):
                    weights = _prune(base, block, module, {}, targets, team)
                    blocks.keep(block, module, weights, journal)
            tick()
        return {}
    read = {a.name for a in accumulators}
    accumulators = resolve({*accumulators, "input_norm"})
    norm = [a for a in accumulators if a.name == "input_norm"]
    inputs = walker.inputs(ids, _batch(walker, ids, reconstruction), team)
    new_values = None
    if reconstruction is not None:
        new_values = Reconstruction(reconstruction, walker, inputs, base.seed)
    mark = bookmark(journal, "prune-streamed" if blocks.streams else "prune")
    start = CandidateState.start(inputs)
    norms: dict[str, tuple[float, Tensor | None]]  # dense, and pruned, which is still in the making
    state, dense_state, done, norms = mark.recall(walker.make_store, walker.device) or (
        start,
        start,
        0,
        {},
    )
    for block in blocks.layout.blocks[:done]:
        with walker.block(block) as module:
            restored = restore(blocks, block, module, journal, team)
        assert restored, "a bookmark lies behind blocks that are kept"
        tick()
    # A pruner or refiner that waits for the device, or for other processes, is given what is known.
    waits = updates_weights(base.pruner) or base.refiner is not None or team.size > 1
    for block in blocks.layout.blocks[done:]:
        with walker.block(block) as module:
            own_run = None
            if new_values is not None and new_values.reads_dense:
                own_run = new_values.dense_run(block, module, dense_state)
                dense_state = own_run.state or dense_state
            if restore(blocks, block, module, journal, team):
                before = journal.norms(block.index)
            else:
                dense = walker.run(block, module, inputs, state, accumulators, output=False)
                means = _mean_norms(dense.statistics)
                statistics = {n: s.only(read) for n, s in dense.statistics.items()}
                del dense
                if waits:
                    walker.unchecked.look()
                    weights = _prune(base, block, module, statistics, targets, team)
                else:
                    scores = ScoreCache(unchecked=walker.unchecked, keep=False)
                    weights = base.prune_block(block, module, statistics, targets, scores)
                before = dict(zip(means, walker.unchecked.look(*means.values()), strict=True))
                journal.keep_norms(block.index, before)
                del statistics
                if new_values is not None:
                    weights = new_values.block(block, module, state, own_run, weights, targets)
                blocks.keep(block, module, weights, journal)
                del weights
            del own_run
            norms_after: Mapping[str, Tensor] = {}
            if block.index < len(blocks.layout.blocks) - 1:
                after = walker.run(block, module, inputs, state, norm)
                state, norms_after = after.state or state, _mean_norms(after.statistics)
        norms |= {n: (x, norms_after.get(n)) for n, x in before.items()}
        tick()
        if mark.due():
            mark.keep((state, dense_state, block.index + 1, norms))
    mark.remove()
    made = iter(walker.unchecked.look(*(x for _, x in norms.values() if x is not None)))
    return {
        n: {"dense": dense, "pruned": None if pruned is None else next(made)}
        for n, (dense, pruned) in norms.items()
    }


def _batch(walker: Walker, ids: Tensor, reconstruction: Plugin | None) -> int | None:
    """Return the windows of a batch where a reconstruction wants fewer; None for the walker's."""
    if reconstruction is None:
        return None
    length = ids.shape[1]
    default = walker.batch or batch_size(walker.device, length)
    return batch_windows(reconstruction, default, length)


def restore(blocks: Blocks, block: Block, module: nn.Module, journal: Journal, team: Team) -> bool:
    """Give a block what an earlier try has pruned of it, which the first process knows."""
    there = blocks.restore(block, module, journal)
    if team.size == 1:
        return there
    linears = {x.name: x for x in block.linears}
    pruned = {n: matrices.weight(x, module, block.name) for n, x in linears.items() if there}
    weights = team.exchange_tensors(pruned)[0]
    matrices.write(linears, weights, module, block.name)
    return bool(weights)


def _prune(
    base: BasePruner,
    block: Block,
    module: nn.Module,
    statistics: Mapping[str, Statistics],
    targets: Mapping[str, Target],
    team: Team,
) -> dict[str, Tensor]:
    """Return a block's pruned weights by linear name; each process prunes some of the linears."""
    own = team.mine([x.name for x in block.linears if x.name in targets])
    wanted = {name: targets[name] for name in own}
    weights: dict[str, Tensor] = {}
    for share in team.exchange_tensors(base.prune_block(block, module, statistics, wanted)):
        weights |= share
    return weights


def _mean_norms(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """Return the mean over inputs of `input_norm` by linear, 0-d each."""
    return {name: s["input_norm"].float().mean() for name, s in statistics.items()}

"""How much work each phase of a run does, by kind: block runs and seconds come from this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from neuroal.layout import Layout
from neuroal.plugins import Plugin
from neuroal.run.reconstruction import reads_dense, stages
from neuroal.types import ReconstructionTraits


@dataclass(frozen=True)
class Work:
    """The work of one phase, by kind; a block run is one window in one block.

    Attributes:
        dense: Block runs of the dense model before the final pruning, with the search's statistics.
        pruned: Block runs with the weights of a candidate, with the metric's statistics.
        prune: Blocks pruned for a candidate.
        final_dense: Block runs of the final pruning with its statistics, the block still dense.
        final_pruned: Block runs of the final pruning with input norms alone, the block pruned.
        final_prune: Blocks pruned for good.
        own: Block runs of the dense model on its own output, beside the final pruning.
        stage: Block runs up to the inputs of one stage of linears, with the statistics of a
            reconstruction.
        reconstruct: Blocks whose linears are reconstructed.
        differentiate: Block runs forwards and backwards, with which a block is reconstructed.
        measure: Blocks that the `measure_block` hooks see.
        logits: Windows whose logits an output metric reads, the dense model's and candidates'.
        evaluate: Blocks on one window of the evaluated texts, which are not among the block runs.
        losses: Windows of these texts, whose logits are compared with the text.
    """

    dense: int = 0
    pruned: int = 0
    prune: int = 0
    final_dense: int = 0
    final_pruned: int = 0
    final_prune: int = 0
    own: int = 0
    stage: int = 0
    reconstruct: int = 0
    differentiate: int = 0
    measure: int = 0
    logits: int = 0
    evaluate: int = 0
    losses: int = 0

    def __add__(self, other: Work) -> Work:
        mine, others = asdict(self), asdict(other)
        return Work(**{kind: count + others[kind] for kind, count in mine.items()})

    @property
    def block_runs(self) -> int:
        """Return the number of block runs of pruning, of every kind."""
        searched = self.dense + self.pruned
        final = self.final_dense + self.final_pruned
        return searched + final + self.own + self.stage + self.differentiate

    def seconds(self, timings: Mapping[str, float]) -> float:
        """Return how long the work takes, given the seconds of one of each kind; 0 if left out."""
        return float(sum(n * timings.get(kind, 0.0) for kind, n in asdict(self).items()))


def generation_work(
    metric: Plugin,
    pruner: Plugin,
    deviation: bool,
    *,
    blocks: int,
    candidates: int,
    windows: int,
    unpruned: int = 0,
) -> Work:
    """Return the work of one generation of candidates, if none is dropped early.

    Every candidate runs every block dense and pruned; the first block runs dense once for all. The
    dense run stops before the block's output, and there is none where nothing reads statistics.
    In `unpruned` of the blocks nothing is ever pruned: they run once for each. Candidates that
    prune the first blocks alike, or not at all, need less. `deviation` is whether
    that of the input norms is measured too.
    """
    plugins = (metric, pruner)
    left = blocks - unpruned
    reads = deviation or any(p.required_statistics() for p in plugins)
    return Work(
        dense=windows * (candidates * (left - 1) + 1) if reads else 0,
        pruned=windows * candidates * blocks,
        prune=candidates * left,
        logits=windows * (candidates + 1) if metric.has("measure_output") else 0,
    )


def reconstruction_work(plugin: Plugin, layout: Layout, windows: int) -> Work:
    """Return the work of a reconstruction; in a block, at most the passes that it announces."""
    blocks = len(layout.blocks)
    steps = sum(len(stages(block)) for block in layout.blocks)
    linears, whole = (plugin.has(f"reconstruct_{x}") for x in ("linear", "block"))
    passes = plugin.traits(ReconstructionTraits).passes if whole else 0
    return Work(
        own=windows * blocks * reads_dense(plugin),
        stage=windows * steps * (linears and bool(plugin.required_statistics())),
        reconstruct=blocks * linears,
        differentiate=windows * blocks * passes,
    )

"""How much work each phase of a run does, by kind: block runs and seconds come from this table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from neuroal.plugins import Plugin


@dataclass(frozen=True)
class Timings:
    """Seconds of the parts of a run, for one window in one block, or for one block.

    Attributes:
        dense: A window, dense, with the search's statistics.
        pruned: A window, pruned, with the metric's statistics.
        prune: The pruning of a block's weights for a candidate.
        final_dense: A window, dense, with the final pruning's statistics.
        final_pruned: A window, pruned, with input norms alone.
        final_prune: The pruning of a block's weights for good.
        measure: The `measure_block` hooks on a block.
        logits: A window's logits from the output of the last block, and an output metric of them.
    """

    dense: float = 0.0
    pruned: float = 0.0
    prune: float = 0.0
    final_dense: float = 0.0
    final_pruned: float = 0.0
    final_prune: float = 0.0
    measure: float = 0.0
    logits: float = 0.0


@dataclass(frozen=True)
class Work:
    """The work of one phase, by kind; `Timings` has the seconds of each.

    Attributes:
        dense: Block runs (one window in one block) of the dense model, before the final pruning.
        pruned: Block runs with the weights of a candidate.
        prune: Blocks pruned for a candidate.
        final_dense: Block runs of the final pruning, with the block still dense.
        final_pruned: Block runs of the final pruning, with the block pruned.
        final_prune: Blocks pruned for good.
        measure: Blocks that the `measure_block` hooks see.
        logits: Windows whose logits an output metric reads, the dense model's and candidates'.
    """

    dense: int = 0
    pruned: int = 0
    prune: int = 0
    final_dense: int = 0
    final_pruned: int = 0
    final_prune: int = 0
    measure: int = 0
    logits: int = 0

    def __add__(self, other: Work) -> Work:
        mine, others = asdict(self), asdict(other)
        return Work(**{kind: count + others[kind] for kind, count in mine.items()})

    @property
    def block_runs(self) -> int:
        """Return the number of block runs of every kind."""
        return self.dense + self.pruned + self.final_dense + self.final_pruned

    def seconds(self, timings: Timings) -> float:
        """Return how long the work takes, in seconds."""
        seconds_of_one, counts = asdict(timings), asdict(self)
        return float(sum(count * seconds_of_one[kind] for kind, count in counts.items()))


def generation_work(
    metric: Plugin, pruner: Plugin, deviation: bool, *, blocks: int, candidates: int, windows: int
) -> Work:
    """Return the work of one generation of candidates of which none is dropped early.

    Every candidate runs every block dense and pruned; the first block runs dense once for all. The
    dense run stops before the block's output, and there is none where nothing reads statistics.
    Candidates that prune the first blocks alike, or not at all, need less.

    Args:
        metric: Plugin of role `alignment`.
        pruner: Plugin of role `pruner`.
        deviation: Whether the deviation of input norms is measured too.
        blocks: Of the model.
        candidates: Of the generation.
        windows: That each of them is measured on.
    """
    plugins = (metric, pruner)
    reads = deviation or any(p.required_statistics() for p in plugins)
    return Work(
        dense=windows * (candidates * (blocks - 1) + 1) if reads else 0,
        pruned=windows * candidates * blocks,
        prune=candidates * blocks,
        logits=windows * (candidates + 1) if metric.has("measure_output") else 0,
    )

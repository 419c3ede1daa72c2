"""Candidates on their way through the blocks, and what they have in common at one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from neuroal.layout import Block
from neuroal.pruning.pruner import ScoreCache
from neuroal.search.outcomes import Trial
from neuroal.types import Target
from neuroal.walk import BlockRun, CandidateState, Inputs


@dataclass(eq=False)
class TrialWalk:
    """One candidate on its way through the blocks.

    Attributes:
        trial: What it prunes.
        state: What its blocks so far gave, before the next one.
        first: The walk whose weights it reuses in blocks that both prune alike.
        lends: Others reuse its weights.
        counts: It is a trial, and not there only to lend its weights.
        total: Misalignment so far, 0-d float64.
        dropped: It was above its limit.
        block_runs: Those that it was the first to need.
        deviation: float32 `(in,)` by linear, of the blocks so far.
    """

    trial: Trial
    state: CandidateState
    first: TrialWalk | None = None
    lends: bool = False
    counts: bool = True
    total: Tensor | float = 0.0
    dropped: bool = False
    block_runs: int = 0
    deviation: dict[str, Tensor] = field(default_factory=dict)

    def add(self, passed: PassedBlock, block_runs: int) -> None:
        """Go on to the next block."""
        self.state = passed.state
        self.total = self.total + passed.misalignment
        self.deviation |= passed.deviation
        self.block_runs += block_runs


@dataclass(frozen=True, eq=False)
class PassedBlock:
    """What one block adds to a candidate.

    Attributes:
        state: The state after it.
        misalignment: Its part, 0-d float64.
        deviation: float32 `(in,)` by linear.
        weights: As pruned, by linear name; kept where others reuse them.
    """

    state: CandidateState
    misalignment: Tensor | float = 0.0
    deviation: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] | None = None


@dataclass(eq=False)
class BlockPass:
    """One block while all candidates pass it, and what they have in common there.

    States are identified by address, which is their own as long as a candidate waits at them.

    Attributes:
        block: Its linears.
        module: The block in the dtype of the search.
        inputs: Search windows.
        waiting: Candidates that have still to pass, by the state that they come from.
        dense: Dense runs by the state that they began at.
        lent: State, targets and weights of walks that lend theirs.
        known: What candidates have passed, by all that it depends on.
        counted: States whose dense run an earlier try has counted: made again, it costs nothing.
        scores: Of the pruner.
    """

    block: Block
    module: nn.Module
    inputs: Inputs
    waiting: Counter[int]
    dense: dict[int, BlockRun] = field(default_factory=dict)
    lent: dict[int, tuple[int, object, Mapping[str, Tensor] | None]] = field(default_factory=dict)
    known: dict[object, PassedBlock] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    scores: ScoreCache = field(default_factory=ScoreCache)

    def key(self, walk: TrialWalk) -> tuple[int, int | None, object]:
        """Return all that decides what a candidate makes of the block."""
        state, targets = id(walk.state), targets_key(self.block, walk.trial.targets)
        reuses = self.reused(walk, targets) is not None
        return state, id(walk.first) if reuses else None, targets

    def reused(self, walk: TrialWalk, targets: object) -> Mapping[str, Tensor] | None:
        """Return the weights of its first one, where a candidate prunes alike on other inputs."""
        state, alike, weights = self.lent.get(id(walk.first), (None, None, None))
        return weights if alike == targets and state != id(walk.state) else None

    def leave(self, state: int) -> None:
        """Forget a dense run after the last candidate: Gram matrices and kept inputs are large."""
        self.waiting[state] -= 1
        if not self.waiting[state]:
            self.dense.pop(state, None)


def lenders_first(walks: list[TrialWalk], start: CandidateState) -> list[TrialWalk]:
    """Tell walks whose weights they reuse, and return those that lend theirs before the others.

    A lender that is not among the trials (another process measures it) walks too, uncounted.
    """
    lenders = {id(w.trial.first): w for w in walks if w.trial.first is w.trial.targets}
    for walk in walks:
        first = walk.trial.first
        if first is not None and id(first) not in lenders:
            lenders[id(first)] = TrialWalk(Trial(first), start, counts=False)
    for lender in lenders.values():
        lender.lends = True
    others = [w for w in walks if not w.lends]
    for walk in others:
        walk.first = lenders.get(id(walk.trial.first))
    return [*lenders.values(), *others]


def targets_key(block: Block, targets: Mapping[str, Target]) -> tuple[object, ...]:
    """Return what tells two candidates' targets for a block apart."""
    return tuple(
        (
            x.name,
            t.ratio,
            str(t.pattern),
            t.comparison,
            t.prune_last,
            _bits(t.counts),
            _bits(t.importance.rows if t.importance else None),
            _bits(t.importance.inputs if t.importance else None),
        )
        for x in block.linears
        if (t := targets.get(x.name)) is not None
    )


def _bits(values: Tensor | None) -> bytes:
    return b"" if values is None else values.numpy().tobytes()

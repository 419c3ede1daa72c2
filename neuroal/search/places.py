"""Where the candidates of an interrupted walk were: what a bookmark keeps of them, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from neuroal.search.trial_walks import BlockPass, TrialWalk, targets_key
from neuroal.walk import CandidateState, Walker
from neuroal.walk.bookmark import Bookmark

Lent = tuple[CandidateState | None, Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Place:
    """A place in the walk of many candidates, in their order of walking.

    Attributes:
        block: The next one; the number of blocks where only an output metric is left.
        passed: Candidates that are through it; then, batches and candidates that are measured.
        counted: States before it whose dense run has been counted.
        lent: By number, of walks through it that lend their weights: the state that they came from,
            if anybody waits there, and their weights.
    """

    block: int = 0
    passed: int = 0
    counted: Sequence[CandidateState] = ()
    lent: Mapping[int, Lent] = field(default_factory=dict)

    @property
    def counted_ids(self) -> set[int]:
        """Return the addresses by which a `BlockPass` knows states."""
        return {id(state) for state in self.counted}

    def ticks(self, walks: Sequence[TrialWalk], blocks: int) -> int:
        """Return how many steps of the progress of a walk through all blocks lie before it."""
        counting = [w.counts for w in walks]
        passed = self.passed if self.block < blocks else 0
        return self.block * sum(counting) + sum(counting[:passed])


def can_go_on_from_here(at: BlockPass, rest: Sequence[TrialWalk]) -> bool:
    """Return whether the candidates that are still to pass a block need nothing of the others.

    One that does what another has done shares it, for nothing; so it is let pass first.
    """
    return not any(at.key(w) in at.known for w in rest if not w.dropped)


def place_in_block(at: BlockPass, walks: Sequence[TrialWalk], passed: int) -> Any:
    """Return what a bookmark keeps when so many candidates have passed a block."""
    if passed == len(walks):
        return place_after(at.block.index + 1, walks, 0)
    waiting = {id(w.state): w.state for w in walks[passed:] if not w.dropped}
    counted = [x for key, x in waiting.items() if key in at.dense or key in at.counted]
    lent = [
        (k, waiting.get(at.lent[id(w)][0]), _plain(at.lent[id(w)][2]))
        for k, w in enumerate(walks[:passed])
        if id(w) in at.lent
    ]
    return place_after(at.block.index, walks, passed) | {"counted": counted, "lent": lent}


def place_after(block: int, walks: Sequence[TrialWalk], passed: int) -> dict[str, Any]:
    """Return what a bookmark keeps where nothing is shared; all is as in `Place`."""
    rows = [
        (
            None if w.dropped else w.state,
            float(w.total),
            w.dropped,
            w.block_runs,
            _plain(w.deviation),
        )
        for w in walks
    ]
    return {"block": block, "passed": passed, "walks": rows, "counted": [], "lent": []}


def recalled(mark: Bookmark, walker: Walker, walks: Sequence[TrialWalk]) -> Place:
    """Put candidates where an earlier try kept them; the first block where it kept nothing."""
    kept = mark.recall(walker.make_store, walker.device)
    if kept is None:
        return Place()
    for walk, row in zip(walks, kept["walks"], strict=True):
        state, walk.total, walk.dropped, walk.block_runs, walk.deviation = row
        walk.state = state or walk.state
    lent = {k: (state, weights) for k, state, weights in kept["lent"]}
    return Place(kept["block"], kept["passed"], kept["counted"], lent)


def lend_again(at: BlockPass, place: Place, walks: Sequence[TrialWalk]) -> None:
    """Let walks that are through a block lend their weights to those that are not."""
    for k, (state, weights) in place.lent.items():
        targets = targets_key(at.block, walks[k].trial.targets)
        at.lent[id(walks[k])] = id(state), targets, weights


def _plain(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if tensors is None else dict(tensors)

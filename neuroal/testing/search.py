"""A strategy driven to its end by made-up costs, as the engine drives it by measured ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neuroal.layout import Layout
from neuroal.types import Generation, Measurement, Proposal, Proposals

WINDOWS = 8  # search windows of the made-up engine
# The cost of the k-th proposal that is measured, k = 0, 1, ...
COSTS: Mapping[str, Callable[[int], float]] = {
    "scattered": lambda k: 1 + math.sin(12.9898 * k),
    "all equal": lambda k: 1.0,
    "ever lower": lambda k: 1 / (1 + k),
    "ever higher": lambda k: 1.0 + k,
}


@dataclass(frozen=True, eq=False)
class SearchQuestion:
    """What a strategy is asked.

    Attributes:
        name: What is special about it.
        layout: Blocks and linears.
        mean: The ratio of the budget.
        arguments: Of the hook, but for `rng`.
        ordinary: Nothing is special: equal blocks, a sparsity in the middle.
    """

    name: str
    layout: Layout
    mean: float
    arguments: Mapping[str, Any]
    ordinary: bool


@dataclass(frozen=True, eq=False)
class SearchTrace:
    """What a search proposed.

    Attributes:
        generations: What it yielded.
        returned: What it returned.
        ended: It returned, and was not stopped.
        can_win: A proposal that is not a probe was measured to its end.
    """

    generations: tuple[Generation, ...]
    returned: Proposal | None
    ended: bool
    can_win: bool

    def proposals(self, probes: bool = True) -> Iterator[Proposal]:
        """Yield every proposal, or those that can win; the returned one last."""
        for generation in self.generations:
            if probes or not generation.probe:
                yield from generation.proposals
        if self.returned is not None:
            yield self.returned

    @property
    def said(self) -> tuple[object, ...]:
        """Return everything that two equal searches have in common."""
        return self.generations, self.returned, self.ended


def drive(steps: Proposals, cost: Callable[[int], float], most: int) -> SearchTrace:
    """Run a search on made-up costs, at most `most` generations.

    As in the engine, what is worse than the best so far may be dropped where only the best of a
    generation counts. The cost of a proposal is that of its number, from 0 on.
    """
    generations: list[Generation] = []
    best, measured = math.inf, 0
    answer: list[Measurement] | None = None
    try:
        while len(generations) < most:
            generation = steps.send(answer) if answer is not None else next(steps)
            generations.append(generation)
            may_drop = generation.drop_early and not generation.probe
            windows = min(generation.windows or WINDOWS, WINDOWS)
            values = [cost(measured + k) for k in range(len(generation.proposals))]
            measured += len(values)
            answer = [Measurement(x, may_drop and x > best, windows) for x in values]
            if not generation.probe:
                best = min([best, *(m.misalignment for m in answer if not m.dropped)])
    except StopIteration as stop:
        return SearchTrace(tuple(generations), stop.value, True, best < math.inf)
    steps.close()
    return SearchTrace(tuple(generations), None, False, best < math.inf)

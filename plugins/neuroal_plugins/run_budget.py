"""What a search may still spend, in block runs, and what its candidates and probes cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neuroal import Measurement


class RunBudget:
    """Block runs that a search has left, and prices that it learns as it pays.

    The dense reference of a metric is counted once for every number of windows, needed or not: one
    run of every block on each of them. Numbers of windows are None for all search windows.
    """

    def __init__(self, left: float, blocks: int, windows: int, candidate: int) -> None:
        """Start after one candidate on all windows, which cost `candidate`, was paid.

        Args:
            left: Block runs without that candidate and its reference; infinite for no limit.
            blocks: Blocks of the model.
            windows: All search windows.
            candidate: Price of a candidate on all of them.
        """
        self.left = left
        self.windows = windows
        self.candidate = candidate
        self._blocks = blocks
        self._referenced: set[int | None] = {None}
        self._prices: dict[int | None, int] = {}
        self._per_block = candidate / (blocks * windows)
        self._after_change = self._per_block

    @classmethod
    def with_reserve(cls, total: float, blocks: int, windows: int, candidate: int) -> RunBudget:
        """Return the budget of `total` block runs after a first candidate and its reference.

        The price of one window, of a candidate and of its reference, is set aside as well.
        """
        references = blocks * sum({1, windows})
        left = total - candidate - candidate // windows - references
        budget = cls(left, blocks, windows, candidate)
        budget._referenced |= {1, windows}
        return budget

    def pay(
        self,
        measured: Sequence[Measurement],
        windows: int | None = None,
        changed: Sequence[int] = (),
    ) -> None:
        """Subtract what was measured on that many windows, and their reference.

        Args:
            measured: The answers to one generation.
            windows: What the generation was measured on.
            changed: For probes around a first proposal that they reuse the weights of, the block
                that each of them changes. They show what a block after a change costs: one run, or
                two where the metric compares it with its dense run.
        """
        runs = sum(m.block_runs for m in measured)
        self.left -= runs + self._reference(windows)
        self._referenced.add(windows)
        highest = max(m.block_runs for m in measured)
        self._prices[windows] = max(self._prices.get(windows, 0), highest)
        if changed and windows is not None:
            after = sum(self._blocks - block for block in changed)
            price = (runs / windows - self._per_block * self._blocks) / after
            self._after_change = max(math.ceil(price - 1e-6), 1)

    def affordable(self, windows: int | None) -> int | None:
        """Return how many candidates can be paid on that many windows; None for any number.

        Each at the highest price paid there so far, or at that of a candidate on all windows.
        """
        if math.isinf(self.left):
            return None
        left = max(self.left - self._reference(windows), 0)
        return int(left // max(self._prices.get(windows, self.candidate), 1))

    def probes(self, changed: Sequence[int], windows: int, *, reuse: bool = False) -> int:
        """Return the price of one probe a change on that many windows, at most.

        Blocks before the change are run once for all probes. Where the weights of the first probe
        are reused, blocks after a change cost what `pay` learnt, and a candidate's price before.

        Args:
            changed: The first block that each probe changes.
            windows: What they are measured on.
            reuse: Whether the weights of the first one are reused.
        """
        after = sum(self._blocks - block for block in changed)
        per_block = self._after_change if reuse else self._per_block
        return math.ceil((self._per_block * self._blocks + per_block * after) * windows)

    def fits(self, probes: int, candidates: int) -> bool:
        """Return whether probes of a price and that many candidates on all windows can be paid."""
        return probes + candidates * self.candidate <= self.left

    def _reference(self, windows: int | None) -> int:
        if windows is None or windows in self._referenced:
            return 0
        return self._blocks * windows

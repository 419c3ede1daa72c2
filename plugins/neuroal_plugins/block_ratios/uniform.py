"""The same ratio everywhere."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl


@dataclass(frozen=True, eq=False)
class UniformBlocks:
    """ratio = S for every linear."""

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Return the uniform allocation; nothing is measured."""
        yield from ()
        return Proposal(dict.fromkeys(layout.linears, sparsity))

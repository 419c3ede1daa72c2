"""No row step."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from neuroal import Generation, Measurement, Proposal, hookimpl


@dataclass(frozen=True, eq=False)
class UniformRows:
    """Every row of a linear gets the linear's ratio: the block step's allocation as it is."""

    @hookimpl
    def propose_row_ratios(
        self, base: Mapping[str, float]
    ) -> Generator[Generation, list[Measurement], Proposal]:
        """Return the base allocation; nothing is measured."""
        yield from ()
        return Proposal(dict(base))

"""A row step that weighs rows by chance, on the command line `tests/programs/weighs.py:Weighs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from neuroal import Generation, Importance, Layout, Proposal, RowRatiosTraits, hookimpl


@dataclass(frozen=True, eq=False)
class Weighs:
    """Three candidates: importance is at random, to three powers."""

    @hookimpl
    def describe(self) -> RowRatiosTraits:
        return RowRatiosTraits(weighs_rows=True)

    @hookimpl
    def propose_row_ratios(
        self, layout: Layout, base: Mapping[str, float], rng: torch.Generator
    ) -> Any:
        drawn = {
            n: torch.rand(x.out_features, generator=rng, dtype=torch.float64) + 0.1
            for n, x in layout.linears.items()
        }
        made = (
            Proposal(
                dict(base),
                {"power": power},
                importance={n: Importance(x**power) for n, x in drawn.items()},
            )
            for power in (0.5, 1.0, 2.0)
        )
        yield Generation(list(made))

"""Row ratios from measured sensitivities: NeuroAL's scores, with a lam of its own per linear."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroal import Generation, Layout, Linear, Measurement, Proposal, hookimpl, option
from neuroal_plugins import density
from neuroal_plugins.budgeted import Purse, Unit, project
from neuroal_plugins.row_ratios.neuroal import Neuroal

LAMBDAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
Lams = dict[str, float]  # by linear; negative where the rows of higher score are to be sparser


@dataclass(frozen=True, eq=False)
class RowSensitivity:
    """NeuroAL's row step, then Newton steps on a lam per linear.

    Rows are scored as NeuroAL scores them, those of grouped heads and of the last block too. First
    all linears have one lam, the best of a short grid. Around it every linear's lam is moved up and
    down by `probe`, alone; D+ and D- are the damages, D that of no move. lam falls by scale g / c,
    g = (D+ - D-) / (2 probe), c = (D+ + D- - 2D) / probe², or by `cap` against the sign of g where
    c is not positive, and never by more than `cap`. Each of `scales` is measured on all windows;
    the best goes on to the next round, until none is better or the budget ends.

    The damage is whatever the alignment metric measures. lam = 0 is in the grid: no result is worse
    than rows of equal ratio. Probes see fewer windows where the budget asks for it, and are left
    out where it has not even one window for them.
    """

    candidates: float = option(
        32, "budget as a number of candidates on all windows, the grid's among them"
    )
    lambdas: tuple[float, ...] = option(LAMBDAS, "the grid of the lam that all linears share first")
    probe_windows: int = option(8, "search windows that probes are measured on")
    probe: float = option(0.1, "change of one linear's lam in a probe")
    scales: tuple[float, ...] = option((1.0, 0.5), "fractions of the Newton step that are measured")
    cap: float = option(0.15, "largest change of a lam")

    def __post_init__(self) -> None:
        density.check_lambdas(self.lambdas)
        for name in ("candidates", "probe_windows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number")
        for name in ("probe", "cap"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside (0, 1)")
        for scale in self.scales:
            if not scale > 0:
                raise ValueError(f"scales: {scale} is not a positive number")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms, whose difference is the deviation."""
        return frozenset({"input_norm"})

    @hookimpl
    def propose_row_ratios(
        self, layout: Layout, base: Mapping[str, float], deviation: Mapping[str, Tensor]
    ) -> Generator[Generation, list[Measurement], None]:
        """Yield the grid, and rounds of probes and moves; the best-aligned wins."""
        scores = Neuroal(grouped_heads=True, last_block=True).row_scores(layout, deviation)

        def proposal(
            lams: Mapping[str, float], parameters: dict[str, Any], probe: bool
        ) -> Proposal:
            ratios = {
                n: _rows(x, scores[n], lams.get(n, 0.0), base[n]) for n, x in layout.linears.items()
            }
            return Proposal(ratios, parameters, probe)

        scored = [n for n, x in scores.items() if x is not None]
        (one,) = yield Generation([proposal({}, {"lam": 0.0}, True)], windows=1)
        grid = [dict.fromkeys(scored, lam) for lam in self.lambdas]
        heard = yield Generation(
            [proposal(g, {"lam": lam}, False) for g, lam in zip(grid, self.lambdas, strict=True)]
        )
        costs = [math.inf if m.dropped else m.misalignment for m in heard]
        best = costs.index(min(costs))
        at, full = grid[best], heard[best].block_runs
        windows = max(round(full / max(one.block_runs, 1)), 1)
        purse = Purse(int(self.candidates * full), len(layout.blocks), windows, full)
        purse.pay([one, *heard], windows)
        cost = costs[best]
        units = [Unit(n, (), layout.linears[n].block) for n in scored]
        few = min(self.probe_windows, windows)
        while few > 1 and not purse.fits(2 * purse.probes(units, few), len(self.scales)):
            few -= 1
        moves = [(n, sign * self.probe) for n in scored for sign in (1, -1)]
        number = 0
        while scored and purse.fits(2 * purse.probes(units, few), len(self.scales)):
            number += 1
            probes = [proposal(at, {"round": number, "at": "best"}, True)]
            probes += [
                proposal(_moved(at, {n: by}), {"round": number, "only": n, "by": by}, True)
                for n, by in moves
            ]
            heard = yield Generation(probes, len(probes), few)
            purse.pay(heard, few)
            step = self._newton(scored, [m.misalignment for m in heard])
            tried = [_moved(at, {n: s * by for n, by in step.items()}) for s in self.scales]
            labels = [{"round": number, "newton": s} for s in self.scales]
            heard = yield Generation(
                [proposal(lams, told, False) for lams, told in zip(tried, labels, strict=True)],
                len(tried),
            )
            purse.pay(heard, windows)
            found = [m.misalignment for m in heard]
            if min(found) >= cost:
                break
            cost, at = min(found), tried[found.index(min(found))]

    def _newton(self, scored: Sequence[str], damages: Sequence[float]) -> Lams:
        """Return the step of every linear's lam; damages of no move, then up and down in turn."""
        here, up, down = damages[0], damages[1::2], damages[2::2]
        step = {}
        for name, higher, lower in zip(scored, up, down, strict=True):
            slope = (higher - lower) / (2 * self.probe)
            bend = (higher + lower - 2 * here) / self.probe**2
            by = -slope / bend if bend > 0 else -math.copysign(self.cap, slope)
            step[name] = min(max(by, -self.cap), self.cap)
        return step


def _rows(linear: Linear, scores: Tensor | None, lam: float, base: float) -> Tensor:
    """Return NeuroAL's ratios of rows; their mean is `base` even where some are clipped."""
    if scores is None:
        return torch.full((linear.out_features,), base, dtype=torch.float64)
    rows = density.spread(scores, lam, base)
    clipped = density.clip_row_ratios(rows)
    if torch.equal(rows, clipped):
        return rows
    return project(rows, torch.full_like(rows, 1 / len(rows)), base)


def _moved(lams: Mapping[str, float], by: Mapping[str, float]) -> Lams:
    return {n: lam + by.get(n, 0.0) for n, lam in lams.items()}

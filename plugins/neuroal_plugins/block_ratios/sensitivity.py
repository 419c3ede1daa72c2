"""Ratios per linear from measured sensitivities: equal marginal damage everywhere."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Generation, Layout, Measurement, Proposal, hookimpl, option
from neuroal_plugins.density import HIGHEST

PAPER_CANDIDATES = 14 + 15  # of NeuroAL's two steps: 2 L n block runs each on n windows
Heard = Generator[Generation, list[Measurement], None]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Equal marginal damage: linears whose next weight hurts most stay denser."""

    block_runs: int | None = option(None, "block runs at most, in all; None is `candidates`'")
    candidates: float = option(29.0, "budget as full candidates")
    probe_windows: int = option(2, "")
    probe: float = option(0.1, "")
    steepness: float = option(9.0, "")
    starts: tuple[float, ...] = option((0.25, 0.5), "")
    step: float = option(0.1, "")
    factors: tuple[float, ...] = option((0.5, 1.0, 2.0), "")
    memory: float = option(0.0, "")
    central: bool = option(False, "")
    verbose: bool = option(False, "")

    @hookimpl
    def propose_block_ratios(
        self, layout: Layout, sparsity: float, rng: torch.Generator
    ) -> Generator[Generation, list[Measurement], Proposal | None]:
        names = tuple(layout.linears)
        n = torch.tensor([x.weights for x in layout.linears.values()], dtype=torch.float64)
        N, L = len(names), len(layout.blocks)

        def prop(r: Tensor, probe: bool = False, **par) -> Proposal:
            return Proposal(dict(zip(names, (float(x) for x in r), strict=True)), par, probe)

        def project(r: Tensor) -> Tensor:
            lo, hi = -2.0, 2.0
            for _ in range(60):
                mid = (lo + hi) / 2
                if float(((r + mid).clamp(0, HIGHEST) * n).sum() / n.sum()) < sparsity:
                    lo = mid
                else:
                    hi = mid
            return (r + hi).clamp(0, HIGHEST)

        seen = set()
        left = [0.0]

        def spend(ms, w):
            left[0] -= sum(m.block_runs for m in ms)
            if w not in seen:
                seen.add(w)
                left[0] -= L * w

        u = torch.full((N,), sparsity, dtype=torch.float64)
        one = yield Generation([prop(u, True, what="windows")], 1, 1)
        first = yield Generation([prop(u, what="uniform")])
        W = round(first[0].block_runs / one[0].block_runs)
        left[0] = self.block_runs or self.candidates * 2 * L * W
        spend(one, 1)
        spend(first, W)
        price = first[0].block_runs
        best, cost = u, first[0].misalignment
        w = min(self.probe_windows, W)
        # only-l
        ms = yield Generation(
            [prop(u * (torch.arange(N) == i), True, only=names[i]) for i in range(N)], N, w
        )
        spend(ms, w)
        c = torch.tensor([m.misalignment for m in ms], dtype=torch.float64).clamp(min=1e-9)
        lm = (c / n).log()
        cands = [project(u - t * (lm - (lm * n).sum() / n.sum()) / self.steepness) for t in self.starts]
        ms = yield Generation([prop(r, start=t) for r, t in zip(cands, self.starts)], len(cands))
        spend(ms, W)
        for r, m in zip(cands, ms):
            if m.misalignment < cost:
                best, cost = r, m.misalignment
        eta = self.step
        est = None
        rounds = 0
        while True:
            # estimate of a round
            per = sum((L - x.block + 1) for x in layout.linears.values()) * price / (L * W)
            per *= 2 if self.central else 1
            if self.verbose:
                print(f'round {rounds} w {w} left {left[0]:.0f} cost {cost:.4f} eta {eta}', flush=True)
            if per * w + len(self.factors) * price > left[0]:
                break
            d = torch.minimum(torch.tensor(self.probe).double(), (1 - best) / 2)
            pr = [best + d * (torch.arange(N) == i) for i in range(N)]
            if self.central:
                pr += [(best - d * (torch.arange(N) == i)).clamp(min=0) for i in range(N)]
            ms = yield Generation(
                [prop(best, True, round=rounds, at="here")]
                + [prop(r, True, round=rounds, at=i) for i, r in enumerate(pr)], N, w)
            spend(ms, w)
            v = torch.tensor([m.misalignment for m in ms], dtype=torch.float64)
            if self.central:
                g = (v[1:1 + N] - v[1 + N:]) / (pr[0:N][0].new_tensor([float(pr[i][i] - pr[N + i][i]) for i in range(N)]))
            else:
                g = (v[1:] - v[0]) / d
            g = g / n
            if est is not None:
                g = self.memory * est + (1 - self.memory) * g
            order = g.argsort()
            mu = g[order][torch.searchsorted(n[order].cumsum(0), n.sum() / 2)]
            scale = 2 * g.abs().median()
            s = torch.tanh((g - mu) / scale)
            cands = [project(best - eta * f * s) for f in self.factors]
            ms = yield Generation([prop(r, round=rounds, eta=eta * f) for r, f in zip(cands, self.factors)], len(cands))
            spend(ms, W)
            k = min(range(len(cands)), key=lambda i: ms[i].misalignment)
            if self.verbose: print([round(m.misalignment, 4) for m in ms])
            if ms[k].misalignment < cost:
                delta = cands[k] - best
                best, cost = cands[k], ms[k].misalignment
                eta *= self.factors[k]
                est = g * (self.steepness * delta).exp()
            else:
                eta *= 0.3
                w = min(2 * w, W)
            rounds += 1
        return None

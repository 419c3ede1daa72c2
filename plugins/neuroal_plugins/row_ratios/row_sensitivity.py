"""Importance of rows and inputs from measured sensitivities."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neuroal import (
    Block,
    Generation,
    Importance,
    Layout,
    Linear,
    Measurement,
    Proposal,
    RowRatiosTraits,
    Statistics,
    hookimpl,
    option,
)
from neuroal_plugins.heads import Heads
from neuroal_plugins.row_ratios.neuroal import Neuroal
from neuroal_plugins.run_budget import RunBudget

Score = Literal["reads", "own", "lost", "norm"]
Side = tuple[str, Literal["rows", "inputs"]]  # of a linear
Move = tuple[Side, Score]  # what log importance moves along
Scores = Mapping[Score, Tensor]  # of one side, float64 `(out,)` or `(in,)`
Logs = Mapping[Side, Tensor]  # log importance, float64 `(out,)` or `(in,)`
Rated = tuple[float, Logs]  # misalignment on all search windows
Exponents = Mapping[Score, float]  # of scores, in all linears
TOGETHER = 64  # probes of one generation, whose states are held together
RATIO, SMALLEST = 5 / 3, 0.1  # between shares of a step; no smaller one is followed further
FURTHEST = 13.0  # from 1, in log importance: what is further counts as this far
FAINT = 1e-4  # of the largest energy: what is smaller counts as this much


@dataclass(frozen=True, eq=False)
class RowSensitivity:
    """Importance c_i of rows, log c a sum of scores, moved along each as measured damages say.

    Three scores of a row. "reads": log energy with which what follows reads it, ||W'_:i|| ||x_i||
    of the linear W' that its output x_i feeds; for a query the energy of the key that it meets, and
    the other way round. "own": log energy of its weights, sqrt(sum_j W_ij² ||X_j||²). "lost":
    NeuroAL's deviation (Cunegatti et al. 2025) at its consumer. Energies are those of Wanda scores
    (Sun et al. 2023), on the dense model. Where the pruner only scores, inputs have an importance
    d_j too, log d along "norm", log ||X_j||: Wanda's own exponent of it is 1, magnitude's 0. A
    pruner that moves weights knows its inputs by their Gram matrix.

    First log c = a reads + b own in all linears, a of `reads` and b of `own`, the best on few
    windows; then log d = e norm, e of `norm` or 0. Then every linear's log c and log d are moved up
    and down by `probe` along each score, alone, scores of rows made orthogonal in this order and
    all scaled to a mean square of 1; D+ and D- are the damages, D that of no move. It falls by
    scale g / (max(h, 0) + m), g = (D+ - D-) / (2 probe), h = (D+ + D- - 2D) / probe², m the median
    of all |h|: a Newton step, shortened because the moves of all linears come together. Two shares
    of the step are measured on all windows, and further ones while the longest or the shortest is
    the best; the best goes on to the next round, until none is better or the budget ends. Later
    rounds probe the moves alone that promised most of what the first round could gain,
    g² / 2 (max(h, 0) + m) each, and keep its m.

    The damage is whatever the alignment metric measures. Blocks behind the one that a probe changes
    keep the weights that they have without the change. Rows that count as the pruner has it are
    a candidate: no result is worse. Probes see fewer windows where the budget asks for it, and are
    left out where it has not even one window for them.
    """

    candidates: float = option(
        48, "budget as a number of candidates on all windows, the grid's among them"
    )
    reads: tuple[float, ...] = option((0.0, 0.25, 0.5), "first exponents of the energy that reads")
    own: tuple[float, ...] = option((0.0, -0.4), "first exponents of a row's own energy")
    norm: tuple[float, ...] = option(
        (-0.5, -0.25, 0.25, 0.5), "first exponents of an input's norm, beside 0"
    )
    probe_windows: int = option(8, "search windows that first exponents and probes are measured on")
    probe: float = option(0.1, "length of a probe, in units of log importance")
    share: float = option(0.5, "share of the step that is tried first, with a smaller one")
    cap: float = option(0.2, "largest move along one score, of the whole step")
    lasting: float = option(
        0.9, "share of the first round's expected gain whose moves later rounds probe, in (0, 1]"
    )

    def __post_init__(self) -> None:
        for name in ("candidates", "probe_windows", "probe", "share", "cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number")
        for name in ("reads", "own"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one")
        if not 0 < self.lasting <= 1:
            raise ValueError(f"lasting={self.lasting} is outside (0, 1]")

    @hookimpl
    def describe(self) -> RowRatiosTraits:
        """Return that rows are weighed, under every pruner, and the budget."""
        return RowRatiosTraits(weighs_rows=True, candidates=self.candidates)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms: of the energies, and of the deviation."""
        return frozenset({"input_norm"})

    @hookimpl
    def measure_block(
        self, block: Block, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
    ) -> dict[str, Tensor]:
        """Return squared energies of every linear's rows, columns and inputs, float64."""
        energies = {}
        for x in block.linears:
            inputs = statistics[x.name]["input_norm"].square()
            squares = weights[x.name].square() * inputs
            energies[f"rows {x.name}"] = squares.sum(dim=1, dtype=torch.float64).cpu()
            energies[f"columns {x.name}"] = squares.sum(dim=0, dtype=torch.float64).cpu()
            energies[f"inputs {x.name}"] = inputs.cpu().double()
        return energies

    @hookimpl
    def propose_row_ratios(
        self,
        layout: Layout,
        base: Mapping[str, float],
        deviation: Mapping[str, Tensor],
        measurements: Sequence[Mapping[str, Tensor]],
        weighs_inputs: bool,
        windows: int,
    ) -> Generator[Generation, list[Measurement], None]:
        """Yield the grid, and rounds of probes and moves; the best-aligned wins."""
        (alike,) = yield Generation([Proposal(dict(base), {"rows": "alike"})])
        price = alike.block_runs
        total = int(self.candidates * price)
        budget = RunBudget.with_reserve(total, len(layout.blocks), windows, price)
        known: dict[Side, Scores] = {}
        for name, scores in row_scores(layout, deviation, measurements).items():
            if base[name] == 0:  # nothing of it is pruned: no row competes
                continue
            known[name, "rows"] = scores
            norm = input_score(layout.linears[name], measurements) if weighs_inputs else None
            if norm is not None:
                known[name, "inputs"] = {"norm": norm}
        if known:
            yield from _Search(self, layout, base, known, budget).run()


class _Search:
    """The state that grid and rounds share."""

    def __init__(
        self,
        options: RowSensitivity,
        layout: Layout,
        base: Mapping[str, float],
        known: Mapping[Side, Scores],
        budget: RunBudget,
    ) -> None:
        self.options = options
        self.base = dict(base)
        self.known = known
        self.budget = budget
        self.along = {side: _orthogonal(scores) for side, scores in known.items()}
        self.moves = [(side, s) for side, scores in self.along.items() for s in scores]
        self.blocks = {name: layout.linears[name].block for name, _ in known}
        self.few = min(options.probe_windows, budget.windows)
        self.damping = 0.0

    def run(self) -> Generator[Generation, list[Measurement], None]:
        """Search from the grid's best, until a round finds nothing better or the budget ends."""
        o = self.options
        grid: list[Exponents] = [{"reads": a, "own": b} for a in o.reads for b in o.own]
        norms = o.norm if any(kind == "inputs" for _, kind in self.known) else ()
        if not self._pays(len(grid)):
            return
        if not self._pays(len(grid) + len(norms)):
            norms = ()
        best = yield from self._first(grid, norms)
        while self.few > 1 and not self._affordable():
            self.few -= 1
        number = 0
        while self.moves and self._affordable():
            number += 1
            slopes, bends = self._differences((yield from self._probe(best[1], number)))
            if number == 1:
                seen = bends[bends != 0].abs()  # an expert that no token reaches bends nothing
                self.damping = float(seen.median()) if len(seen) else 1e-12
            newton = -slopes / (bends.clamp(min=0) + self.damping)
            lengths = newton.clamp(-self.options.cap, self.options.cap)
            step = dict(zip(self.moves, lengths.tolist(), strict=True))
            if number == 1:
                self._keep_moves(-newton * slopes)
            better = yield from self._line(best, step, number)
            if better is best:
                break
            best = better

    def _pays(self, tried: int) -> bool:
        """Return whether so many candidates on few windows, and one on all, can be paid."""
        return self.budget.fits(0, 1 + math.ceil(tried * self.few / self.budget.windows))

    def _first(
        self, grid: Sequence[Exponents], norms: Sequence[float]
    ) -> Generator[Generation, list[Measurement], Rated]:
        """Return the best of exponents that all linears share, measured on all windows."""
        seen = self.few if self.few < self.budget.windows else None
        cost, best = yield from self._best_of(grid, seen)
        if norms:
            weighed: list[Exponents] = [{**best, "norm": x} for x in norms]
            cost, best = min(
                (cost, best), (yield from self._best_of(weighed, seen)), key=lambda rated: rated[0]
            )
        if seen is not None:
            cost, best = yield from self._best_of([best])
        return cost, self._at(best)

    def _best_of(
        self, grid: Sequence[Exponents], seen: int | None = None
    ) -> Generator[Generation, list[Measurement], tuple[float, Exponents]]:
        told = [{str(score): x for score, x in exponents.items()} for exponents in grid]
        costs = yield from self._ask([self._at(x) for x in grid], told, seen)
        return min(zip(costs, grid, strict=True), key=lambda rated: rated[0])

    def _at(self, exponents: Exponents) -> Logs:
        """Return the log importance that exponents shared by all linears make."""
        logs = {}
        for side, scores in self.known.items():
            parts = (x * scores[score] for score, x in exponents.items() if score in scores)
            logs[side] = sum(parts, torch.zeros_like(next(iter(scores.values()))))
        return logs

    def _affordable(self) -> bool:
        """Return whether probes both ways along every move, and two steps, can be paid."""
        changed = [self._block(move) for move in self.moves for _ in (1, -1)]
        begins = math.ceil(len(changed) / (TOGETHER - 1)) * self.budget.probes((), self.few)
        return self.budget.fits(self.budget.probes(changed, self.few, reuse=True) + begins, 2)

    def _probe(
        self, at: Logs, number: int
    ) -> Generator[Generation, list[Measurement], list[float]]:
        """Return the damages of no move, then of every move up and down in turn."""
        best = self._proposal(at, {"round": number, "at": "best"})
        probes: list[tuple[Proposal, int]] = []
        for move, sign in ((move, sign) for move in self.moves for sign in (1, -1)):
            by = sign * self.options.probe
            told = {"round": number, "only": move[0][0], "score": move[1], "by": by}
            made = self._proposal(self._moved(at, {move: by}), told)
            probes.append((made, self._block(move)))
        here, damages = 0.0, list[float]()
        for k in range(0, len(probes), TOGETHER - 1):
            some, changed = zip(*probes[k : k + TOGETHER - 1], strict=True)
            heard = yield Generation(
                [best, *some], windows=self.few, probe=True, reuse_first_weights=True
            )
            self.budget.pay(heard, self.few, changed)
            here, *more = (m.misalignment for m in heard)
            damages += more
        return [here, *damages]

    def _block(self, move: Move) -> int:
        (name, _), _ = move
        return self.blocks[name]

    def _differences(self, damages: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return slope and bend of every move `(moves,)`, from what `_probe` returns."""
        measured = torch.tensor(damages, dtype=torch.float64)
        here, up, down = measured[0], measured[1::2], measured[2::2]
        slopes = (up - down) / (2 * self.options.probe)
        return slopes, (up + down - 2 * here) / self.options.probe**2

    def _keep_moves(self, gains: Tensor) -> None:
        """Keep the fewest moves that promise `lasting` of all gains `(moves,)`, each >= 0."""
        order = gains.argsort(descending=True, stable=True)
        before = gains[order].cumsum(0) - gains[order]
        kept = order[before <= self.options.lasting * gains.sum()].tolist()
        self.moves = [move for i, move in enumerate(self.moves) if i in kept]

    def _line(
        self, best: Rated, step: Mapping[Move, float], number: int
    ) -> Generator[Generation, list[Measurement], Rated]:
        """Return the best share of a step: of two, and further ones while an end is the best."""
        at, costs = best[1], dict[float, float]()
        wanted = [self.options.share, self.options.share / RATIO]
        while wanted and self.budget.fits(0, len(wanted)):
            tried = [self._moved(at, {m: x * by for m, by in step.items()}) for x in wanted]
            told = [{"round": number, "share": round(x, 6)} for x in wanted]
            found = yield from self._ask(tried, told)
            best = min(best, *zip(found, tried, strict=True), key=lambda rated: rated[0])
            costs |= dict(zip(wanted, found, strict=True))
            least = min(costs, key=costs.__getitem__)
            wanted = [least * RATIO] if least == max(costs) else []
            if least == min(costs) and least > SMALLEST:
                wanted = [least / RATIO]
        return best

    def _ask(
        self, tried: Sequence[Logs], told: Sequence[dict[str, Any]], seen: int | None = None
    ) -> Generator[Generation, list[Measurement], list[float]]:
        """Return the damages, on all windows or, as probes, on the first few."""
        made = [self._proposal(logs, p) for logs, p in zip(tried, told, strict=True)]
        heard = yield Generation(
            made, drop_early=len(made) == 1, windows=seen, probe=seen is not None
        )
        self.budget.pay(heard, seen or self.budget.windows)
        return [m.misalignment for m in heard]

    def _proposal(self, logs: Logs, told: dict[str, Any]) -> Proposal:
        found = {side: x.clamp(-FURTHEST, FURTHEST).exp() for side, x in logs.items()}
        importance = {
            name: Importance(x, found.get((name, "inputs")))
            for (name, kind), x in found.items()
            if kind == "rows"
        }
        return Proposal(self.base, told, importance=importance)

    def _moved(self, logs: Logs, by: Mapping[Move, float]) -> Logs:
        moved = dict(logs)
        for (side, score), length in by.items():
            moved[side] = moved[side] + length * self.along[side][score]
        return moved


def row_scores(
    layout: Layout,
    deviation: Mapping[str, Tensor],
    measurements: Sequence[Mapping[str, Tensor]],
) -> dict[str, dict[Score, Tensor]]:
    """Return the scores of every linear that has any, float64 `(out,)` of mean 0.

    Args:
        layout: Blocks and linears.
        deviation: Of every linear's input norms, `(in,)`.
        measurements: What `measure_block` returned, in block order.
    """
    energies = {key: value for found in measurements for key, value in found.items()}
    lost = Neuroal(grouped_heads=True, last_block=True).row_scores(layout, deviation)
    scores: dict[str, dict[Score, Tensor]] = {}
    for name, x in layout.linears.items():
        own: dict[Score, Tensor] = {}
        of_rows: dict[Score, Tensor | None] = {
            "reads": _reads(layout, x, energies),
            "own": energies[f"rows {name}"],
        }
        for score, energy in of_rows.items():
            if energy is not None and bool(energy.max() > energy.min()):
                own[score] = _log_energy(energy)
        deviated = lost[name]
        if deviated is not None:
            own["lost"] = deviated.double()
        if own:
            scores[name] = {score: values - values.mean() for score, values in own.items()}
    return scores


def input_score(linear: Linear, measurements: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Return log ||X_j|| of a linear's inputs, float64 `(in,)` of mean 0; None if all are alike."""
    energy = measurements[linear.block][f"inputs {linear.name}"]
    if not bool(energy.max() > energy.min()):
        return None
    score = _log_energy(energy)
    return score - score.mean()


def _log_energy(squares: Tensor) -> Tensor:
    return squares.clamp(min=float(squares.max()) * FAINT**2).log() / 2


def _reads(layout: Layout, linear: Linear, energies: Mapping[str, Tensor]) -> Tensor | None:
    """Return the squared energy with which every row is read, `(out,)`; None where one is not."""
    read = torch.full((linear.out_features,), torch.nan, dtype=torch.float64)
    if linear.fed is not None:
        columns = energies[f"columns {linear.fed.linear}"]
        for row, column, length in linear.fed.runs:
            fed = slice(row, row + length)
            read[fed] = read[fed].nan_to_num(0) + columns[column : column + length]
    for rows, energy in _met(layout, linear, energies):
        read[rows] = energy
    return None if bool(read.isnan().any()) else read


def _met(
    layout: Layout, linear: Linear, energies: Mapping[str, Tensor]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the queries and the keys among a linear's rows, with the energy of what they meet."""
    heads = Heads.of(layout, linear)
    named = {rows.name: rows.indices() for rows in linear.rows if rows.name in ("q", "k")}
    if heads is None or not named:
        return
    beside = [x for x in layout.blocks[linear.block].linears if x.group == linear.group]
    found = {
        rows.name: energies[f"rows {x.name}"][rows.indices()] for x in beside for rows in x.rows
    }
    if "q" not in found or "k" not in found:
        return
    if len(found["q"]) != len(heads.shared) or len(found["k"]) != heads.values:
        return
    if "q" in named:
        yield named["q"], found["k"][heads.shared]
    if "k" in named:
        yield named["k"], heads.summed(found["q"])


def _orthogonal(scores: Scores) -> dict[Score, Tensor]:
    """Return scores made orthogonal in their order, of mean square 1; without what is left of none.

    Moves along them hardly depend on each other.
    """
    found: dict[Score, Tensor] = {}
    for score, values in scores.items():
        left = values
        for other in found.values():
            left = left - (left * other).mean() * other
        size = left.square().mean().sqrt()
        if float(size) > 1e-6 * float(values.square().mean().sqrt()):
            found[score] = left / size
    return found

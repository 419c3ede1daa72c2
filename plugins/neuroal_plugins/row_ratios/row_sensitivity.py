"""Importance of rows and inputs: exponents of measured energies."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

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

Scores = Mapping[str, Tensor]  # of one linear by name, float64 `(out,)`, of its inputs `(in,)`
LARGEST_LOG = 13.0  # log importance is clipped to [-LARGEST_LOG, LARGEST_LOG]
SMALLEST_ENERGY = 1e-4  # of the largest: smaller ones are raised to this


@dataclass(frozen=True, eq=False)
class RowSensitivity:
    """log c_i = a reads_i + b own_i of rows and log d_j = e norm_j of inputs, the best a, b and e.

    reads: log energy with which what follows reads the row, ||W'_:i|| ||x_i|| of the linear W' that
    its output x_i feeds; for a query the energy of the key that it meets, and the other way round.
    own: log energy of its weights, sqrt(sum_j W_ij² ||X_j||²). norm: log ||X_j||, of which Wanda's
    own exponent is 1 and magnitude's 0. Energies are those of Wanda scores (Sun et al. 2023,
    arXiv:2306.11695, eq. 1), on the dense model. All scores have a mean of 0.

    All linears share the exponents. a of `reads` and b of `own` are the best pair on few windows;
    then e is the best of `norm` and 0. Inputs are weighed under pruners that only score: one that
    updates weights knows its inputs by their Gram matrix. The best exponents are measured on all
    windows, and so are rows and inputs without importance: no result is worse.
    """

    reads: tuple[float, ...] = option((0.0, 0.25, 0.5), "exponents of the energy that reads a row")
    own: tuple[float, ...] = option((0.0, -0.4), "exponents of a row's own energy")
    norm: tuple[float, ...] = option(
        (-0.5, -0.25, 0.25, 0.5), "exponents of an input's norm, in addition to 0"
    )
    probe_windows: int = option(8, "search windows that exponents are compared on")

    def __post_init__(self) -> None:
        if not self.probe_windows > 0:
            raise ValueError(f"probe_windows={self.probe_windows} is not a positive number")
        for name in ("reads", "own"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one")

    @hookimpl
    def describe(self) -> RowRatiosTraits:
        """Return that rows are weighed, under every pruner."""
        return RowRatiosTraits(weighs_rows=True)

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return the input norms, of which energies are made."""
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
        measurements: Sequence[Mapping[str, Tensor]],
        weighs_inputs: bool,
        windows: int,
    ) -> Generator[Generation, list[Measurement], None]:
        """Yield no importance, exponents of rows, then of inputs, and the best."""
        yield Generation([Proposal(dict(base), {"rows": "alike"})])
        scores: dict[str, Scores] = {}
        for name, of_rows in row_scores(layout, measurements).items():
            norm = input_score(layout.linears[name], measurements) if weighs_inputs else None
            scores[name] = of_rows if norm is None else {**of_rows, "norm": norm}
        if not scores:
            return
        few = self.probe_windows if self.probe_windows < windows else None
        grid = [{"reads": a, "own": b} for a in self.reads for b in self.own]
        cost, best = yield from _least(base, scores, grid, few)
        if any("norm" in of_linear for of_linear in scores.values()) and self.norm:
            grid = [{**best, "norm": e} for e in self.norm]
            with_inputs, weighed = yield from _least(base, scores, grid, few)
            best = weighed if with_inputs < cost else best
        if few is not None:
            yield Generation([_proposal(base, scores, best)])


def _least(
    base: Mapping[str, float],
    scores: Mapping[str, Scores],
    grid: Sequence[Mapping[str, float]],
    windows: int | None,
) -> Generator[Generation, list[Measurement], tuple[float, Mapping[str, float]]]:
    """Return the least misalignment of a grid of exponents, and where it is; the first on ties."""
    proposals = [_proposal(base, scores, exponents) for exponents in grid]
    measured = yield Generation(
        proposals, drop_early=False, windows=windows, probe=windows is not None
    )
    costs = [m.misalignment for m in measured]
    return min(costs), grid[costs.index(min(costs))]


def _proposal(
    base: Mapping[str, float], scores: Mapping[str, Scores], exponents: Mapping[str, float]
) -> Proposal:
    importance = {}
    for name, of_linear in scores.items():
        rows = [exponents[score] * x for score, x in of_linear.items() if score != "norm"]
        inputs = exponents.get("norm", 0.0) * of_linear["norm"] if "norm" in of_linear else None
        importance[name] = Importance(
            _importance(sum(rows[1:], rows[0])), None if inputs is None else _importance(inputs)
        )
    return Proposal(dict(base), dict(exponents), importance=importance)


def _importance(logs: Tensor) -> Tensor:
    return logs.clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def row_scores(
    layout: Layout, measurements: Sequence[Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return `reads` and `own` of every linear that has one, float64 `(out,)` of mean 0.

    Args:
        layout: Blocks and linears.
        measurements: What `measure_block` returned, in block order.
    """
    energies = {name: x for of_block in measurements for name, x in of_block.items()}
    scores: dict[str, dict[str, Tensor]] = {}
    for name, linear in layout.linears.items():
        squares = {"reads": _reads(layout, linear, energies), "own": energies[f"rows {name}"]}
        centred = {
            score: _log_energy(x)
            for score, x in squares.items()
            if x is not None and bool(x.max() > x.min())
        }
        if centred:
            scores[name] = centred
    return scores


def input_score(linear: Linear, measurements: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Return log ||X_j|| of a linear's inputs, float64 `(in,)` of mean 0; None if all are equal."""
    squares = measurements[linear.block][f"inputs {linear.name}"]
    return _log_energy(squares) if bool(squares.max() > squares.min()) else None


def _log_energy(squares: Tensor) -> Tensor:
    """Return half the logarithm of squared energies, of mean 0."""
    logs = squares.clamp(min=float(squares.max()) * SMALLEST_ENERGY**2).log() / 2
    return logs - logs.mean()


def _reads(layout: Layout, linear: Linear, energies: Mapping[str, Tensor]) -> Tensor | None:
    """Return the squared energy with which every row is read, `(out,)`; None where one is not.

    Rows start as NaN, which stays where the layout shows nothing that reads them.
    """
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
    group = [x for x in layout.blocks[linear.block].linears if x.group == linear.group]
    squares = {
        rows.name: energies[f"rows {x.name}"][rows.indices()] for x in group for rows in x.rows
    }
    if "q" not in squares or "k" not in squares:
        return
    if len(squares["q"]) != len(heads.shared) or len(squares["k"]) != heads.values:
        return
    if "q" in named:
        yield named["q"], squares["k"][heads.shared]
    if "k" in named:
        yield named["k"], heads.summed(squares["q"])

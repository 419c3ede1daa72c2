"""Refit: the surviving weights of a linear by least squares, drawn towards the dense output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Linear, Statistics, hookimpl, option

FULL_TARGET = 28.0  # tokens for every input of a linear that would make the target all dense
MOST = 0.5  # of the target is dense: more harms deep models, whose blocks' errors add up
RIDGE = 0.5  # damping where there is one token for every input
LEAST_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Refit:
    """Masked least squares for all rows at once (OPTIMA, arXiv:2512.13886; GPTAQ, 2504.02692).

    Over the weights v of a row that survive, it minimises v H v' - 2 w (H + a (C - H)) v' +
    d |v - w|^2, with H of the inputs that the pruned model has, C of the dense model's inputs with
    those, and w the dense row. a = 0 fits the dense weight's output on the pruned inputs, a = 1 the
    dense model's own output. Rows then get back the size that their dense output has, which least
    squares takes from them where it predicts badly.
    """

    target: float | None = option(
        None,
        "a, the share of the dense model's own output in what is fitted, 0 to 1; by default a "
        "28th of the tokens per input, at most 0.5",
    )
    damping: float | None = option(
        None,
        "d, times the mean diagonal of H; by default half the inputs per token, at least 0.01",
    )
    steps: int = option(12, "of conjugate gradients")
    rescale: float = option(1.25, "by which the rows are multiplied at most; 1 leaves them")

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target <= 1:
            raise ValueError(f"target {self.target} is outside [0, 1]")
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"damping {self.damping} is not positive")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is not positive")
        if self.rescale < 1:
            raise ValueError(f"rescale {self.rescale} is less than 1")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return H; C unless the target is the pruned inputs' own; D where rows are rescaled."""
        dense = set() if self.target == 0 else {"cross_gram"}
        dense |= {"dense_gram"} if self.rescale > 1 else set()
        return frozenset({"gram"} | dense)

    @hookimpl
    def reconstruct_linear(
        self, weight: Tensor, mask: Tensor, values: Tensor, statistics: Statistics, linear: Linear
    ) -> Tensor:
        """Return the fitted values; a row that they would not make better keeps its own.

        The tokens of experts have no counterpart in the dense model: there a is 0.
        """
        gram = statistics["gram"]  # (in, in)
        per_input = statistics.tokens / linear.in_features
        share = min(MOST, per_input / FULL_TARGET) if self.target is None else self.target
        towards = gram
        if share and "cross_gram" in statistics:
            towards = gram.lerp(statistics["cross_gram"], share)
        wanted = weight @ towards  # (out, in)
        damping = self.damping
        if damping is None:
            damping = default_damping(statistics, linear)
        damp = damping * float(gram.diagonal().mean())
        if damp == 0:  # no input was ever anything but 0
            return values
        old, new = solve(gram, wanted, weight, values, mask, damp, self.steps)
        best = better(new, old)
        if self.rescale == 1 or "dense_gram" not in statistics:
            return best.values
        dense = _dot(weight @ statistics["dense_gram"], weight)
        factor = (dense / best.energy.clamp(min=1e-30)).sqrt()  # (out, 1)
        factor = factor.clamp(1 / self.rescale, self.rescale)
        factor = torch.where(best.energy > 0, factor, torch.ones_like(factor))
        return better(best.times(factor), old, best).values


def default_damping(statistics: Statistics, linear: Linear) -> float:
    """Return half the inputs per token, from 0.01 to 1: of the mean diagonal of H."""
    return max(LEAST_DAMPING, RIDGE / max(statistics.tokens / linear.in_features, RIDGE))


def solve(
    gram: Tensor,
    wanted: Tensor,
    weight: Tensor,
    start: Tensor,
    mask: Tensor,
    damp: float,
    steps: int,
) -> tuple[Fit, Fit]:
    """Solve (H + d I) v = b + d w for v of every row on its support, by conjugate gradients.

    Args:
        gram: H, float32 `(in, in)`.
        wanted: b, float32 `(out, in)`.
        weight: w, float32 `(out, in)`, towards which v is drawn.
        start: First v, float32 `(out, in)`, 0 where pruned.
        mask: bool `(out, in)`, True = pruned.
        damp: d > 0.
        steps: Of every row; the inverse diagonal of H + d I preconditions them.

    Returns:
        The first v and the last, both float32 `(out, in)` and 0 where pruned.
    """

    def fit(x: Tensor, residual: Tensor) -> Fit:
        """Return values of which `(aim - x (H + d I))` is `residual` on the support."""
        energy = _dot(x, aim - residual) - damp * _dot(x, x)
        return Fit(x, energy, _dot(x, wanted))

    kept = (~mask).to(gram)
    damped = gram.clone()
    damped.diagonal().add_(damp)
    inverse = 1 / damped.diagonal()
    aim = wanted + damp * weight
    x = start * kept
    residual = (aim - x @ damped).mul_(kept)
    first, x = fit(x, residual), x.clone()
    step = residual * inverse
    size = _dot(residual, step)
    for _ in range(steps):
        along = (step @ damped).mul_(kept)
        curve = _dot(step, along)
        length = torch.where(curve > 0, size / curve, torch.zeros_like(size))
        x.addcmul_(length, step)
        residual.addcmul_(length, along, value=-1)
        scaled = residual * inverse
        new = _dot(residual, scaled)
        turn = torch.where(size > 0, new / size, torch.zeros_like(size))
        step, size = scaled.addcmul_(turn, step), new
    return first, fit(x, residual)


@dataclass(frozen=True)
class Fit:
    """Values of the rows of a linear, and what their error is made of.

    Attributes:
        values: v, `(out, in)`.
        energy: v H v' of every row, `(out, 1)`.
        along: b v' of every row, `(out, 1)`.
    """

    values: Tensor
    energy: Tensor
    along: Tensor

    @property
    def error(self) -> Tensor:
        """Return v H v' - 2 b v' of every row, `(out, 1)`: its error up to a constant."""
        return self.energy - 2 * self.along

    def times(self, factor: Tensor) -> Fit:
        """Return every row times its factor `(out, 1)`."""
        return Fit(self.values * factor, self.energy * factor**2, self.along * factor)


def better(new: Fit, old: Fit, otherwise: Fit | None = None) -> Fit:
    """Return the new values of every row whose error is no larger than that of the old ones.

    Other rows are `otherwise`, or the old.
    """
    rest = old if otherwise is None else otherwise
    chosen = new.error <= old.error
    return Fit(
        torch.where(chosen, new.values, rest.values),
        torch.where(chosen, new.energy, rest.energy),
        torch.where(chosen, new.along, rest.along),
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return a b' of every row, `(out, 1)`."""
    return (a * b).sum(dim=1, keepdim=True)

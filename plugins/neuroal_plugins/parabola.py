"""A lambda found by few measurements: the vertex of a parabola through three of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

from neuroal import Generation, Measurement, Proposal
from neuroal_plugins import density


def search(
    lambdas: Sequence[float], windows: Sequence[int], propose: Callable[[float], Proposal]
) -> Generator[Generation, list[Measurement], Proposal]:
    """Measure three lambdas in each round, and return the proposal at the last parabola's vertex.

    Each further round takes three that are half as far apart, around the vertex of the one before:
    few windows tell where to look, more of them where it is. No lambda is below the first of all,
    or beyond the last by more than half the distance between two.

    Args:
        lambdas: Of the first round, rising.
        windows: Of every round.
        propose: Makes the proposal of a lambda.
    """
    points = list(lambdas)
    step = (points[-1] - points[0]) / 2
    lowest, highest = points[0], points[-1] + step / 2
    best = points[0]
    for count in windows:
        tried = [propose(lam) for lam in points]
        measured = yield Generation(tried, drop_early=False, windows=count)
        best = min(max(vertex(points, [m.misalignment for m in measured]), lowest), highest)
        step /= 2
        start = min(max(best - step, lowest), highest - 2 * step)
        points = [start, start + step, start + 2 * step]
    return propose(best)


def vertex(points: Sequence[float], costs: Sequence[float]) -> float:
    """Return where the parabola through three points `(lam, cost)` is least, near them or far.

    Where it has no minimum, that is the point of the least cost.
    """
    (a, b, c), (y_a, y_b, y_c) = points, costs
    first, second = (y_b - y_a) / (b - a), (y_c - y_b) / (c - b)
    bend = (second - first) / (c - a)
    if not bend > 0 or not math.isfinite(bend):
        return points[list(costs).index(min(costs))]
    return (a + b) / 2 - first / (2 * bend)  # where the slope first + bend (2 lam - a - b) is 0


def check(lambdas: tuple[float, ...], windows: tuple[int, ...]) -> None:
    """Refuse options of which no parabola can be made, with a ValueError."""
    density.check_lambdas(lambdas)
    if len(lambdas) != 3 or sorted(set(lambdas)) != list(lambdas):
        raise ValueError(f"lambdas={lambdas} are not three rising numbers")
    if not windows or min(windows) < 1:
        raise ValueError(f"windows={windows} are not positive numbers, one for every round")

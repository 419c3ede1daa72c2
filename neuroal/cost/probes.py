"""Timing that is over in seconds, however large what is timed: it grows until the time is up.

What does not fit into the time is extrapolated from the largest part that did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuroal.layout import Block, Layout, Linear
from neuroal.walk.states import LinearStatistics
from neuroal.walk.statistics import Statistics

SECONDS = 1.5  # for each kind of probe, unless its smallest part takes longer
_ENOUGH = 0.05  # what is over sooner is timed again, for the least of a few times counts
_TIMES = 3

Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Timed:
    """Seconds by kind of work, and whether they are extrapolated."""

    seconds: Seconds
    extrapolated: bool


def least(work: Callable[[], Seconds]) -> dict[str, float]:
    """Return the least seconds of each kind over a few calls, one if it takes long."""
    found: list[Seconds] = []
    while len(found) < _TIMES and (not found or sum(found[-1].values()) < _ENOUGH):
        found.append(work())
    return {kind: min(x[kind] for x in found) for kind in found[0]}


def grow(
    sizes: Sequence[float],
    work: Callable[[int], Seconds],
    flattest: float,
    steepest: float,
    seconds: float | None = None,
) -> Timed:
    """Time work of growing size; return the seconds of the largest, extrapolated if need be.

    Args:
        sizes: How much work each step has; the last is all of it.
        work: Does the work of a step, by its number, and returns its seconds by kind.
        flattest: The least power of the size that is believed: small work has a start of its own.
        steepest: The power of the size with which the time may grow: a step that would then not
            fit into the seconds is not begun.
        seconds: For all steps; None is `SECONDS`.
    """
    start = time.perf_counter()
    seconds = SECONDS if seconds is None else seconds
    made: list[dict[str, float]] = []
    for k, size in enumerate(sizes):
        if made:
            longest = sum(made[-1].values()) * (size / sizes[k - 1]) ** steepest
            if time.perf_counter() - start + longest > seconds:
                break
        made.append(least(lambda k=k: work(k)))  # type: ignore[misc]
    last = len(made) - 1
    if last == len(sizes) - 1:
        return Timed(made[-1], False)
    before = made[-2] if last else None
    step = math.log(sizes[last] / sizes[last - 1]) if last else 1.0
    found = {}
    for kind, x in made[-1].items():
        grew = 0.0 if before is None else math.log(max(x / max(before[kind], 1e-9), 1e-9)) / step
        found[kind] = x * (sizes[-1] / sizes[last]) ** min(max(grew, flattest), steepest)
    return Timed(found, True)


# -- corners of matrices ---------------------------------------------------------------------


def corner(block: Block, size: int, multiple: int) -> Block:
    """Return a block whose linears are the first rows and columns of its own, at most `size`.

    Inputs are a multiple of M, where a pattern has one. The corners lie where the matrices lie.
    """
    columns = max(size // multiple, 1) * multiple

    def cut(x: Linear) -> Linear:
        rows, inputs = min(x.out_features, size), min(x.in_features, columns)
        return replace(x, out_features=rows, in_features=inputs, paired=None, rows=(), fed=None)

    return replace(block, linears=tuple(map(cut, block.linears)))


def corner_statistics(
    block: Block, statistics: LinearStatistics, layout: Layout
) -> LinearStatistics:
    """Return the statistics of the inputs that a corner has."""
    found: LinearStatistics = {}
    known: dict[tuple[int, int], Statistics] = {}  # linears that share an input share the object
    for x in block.linears:
        if x.name in statistics:
            own, whole = statistics[x.name], layout.linears[x.name].in_features
            key = id(own), x.in_features
            if key not in known:
                cut = {n: _cut(t, whole, x.in_features) for n, t in own.tensors().items()}
                known[key] = Statistics(cut, own.windows, own.tokens)
            found[x.name] = known[key]
    return found


def _cut(x: Tensor, whole: int, size: int) -> Tensor:
    for dim, n in enumerate(x.shape):
        if n == whole:
            x = x.narrow(dim, 0, size)
    return x.contiguous()


def scale(block: Block) -> float:
    """Return a size that grows as the sides of a block's matrices do."""
    return math.sqrt(sum(x.weights for x in block.linears) / len(block.linears))


def synchronised(device: str) -> Callable[[Callable[[], object]], float]:
    """Return what times a call to its end on the device."""

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds

"""Hand-made data for the conformance checks: weights, correlated inputs, targets, layouts.

Everything is made anew, and alike, by every call: a plugin that writes to its inputs spoils nobody
else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal.layout import Block, Layout, Linear
from neuroal.testing import models
from neuroal.types import Accumulator, Pattern, PrunerTraits, Target
from neuroal.walk.statistics import Statistics

TYPICAL = "typical weights and inputs"

Targets = Callable[[int, int], Iterable[tuple[str, Target]]]
"""Targets by name, of a linear of `(out, in)` weights."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers from a seed, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(in_features: int, windows: int = 3, tokens: int = 10, seed: int = 0) -> Tensor:
    """Return inputs that are correlated, of uneven loudness and not centred.

    Returns:
        float32 `(windows, tokens, in)`.
    """
    loudness = random(in_features, seed=seed + 1).exp()
    mix = torch.eye(in_features) + random(in_features, in_features, seed=seed + 2) / 2
    x = random(windows, tokens, in_features, seed=seed)
    return (x @ mix + random(in_features, seed=seed + 3) / 2) * loudness


@dataclass(frozen=True, eq=False)
class LinearCase:
    """One linear and its inputs.

    Attributes:
        name: What is special about it.
        weight: float32 `(out, in)`.
        x: float32 `(windows, tokens, in)`.
    """

    name: str
    weight: Tensor
    x: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def linear(self) -> Linear:
        """Return the linear's description."""
        return models.linear(*self.shape, part="attention")

    def statistics(self, required: Iterable[str | Accumulator]) -> Statistics:
        """Return what real accumulators make of the inputs."""
        return models.collect(self.x, *required, dense=1.25 * self.x)

    def to(self, device: str) -> LinearCase:
        """Return a copy on a device."""
        return LinearCase(self.name, self.weight.to(device), self.x.to(device))


def cases() -> Iterator[LinearCase]:
    """Yield linears that a model may have, the typical one first."""
    weight, x = random(6, 8, seed=10), inputs(8)
    yield LinearCase(TYPICAL, weight, x)
    yield LinearCase("one row", weight[:1].clone(), x)
    yield LinearCase("one column", weight[:, :1].clone(), x[..., :1].clone())
    yield LinearCase("one weight", weight[:1, :1].clone(), x[..., :1].clone())
    yield LinearCase("more than 128 columns", random(2, 132, seed=11), inputs(132, 1, 4))
    yield LinearCase("fewer tokens than inputs", weight, inputs(8, 1, 2))
    yield LinearCase("an input that is always zero", weight, x * (torch.arange(8) != 3))
    yield LinearCase("inputs that are all zero", weight, torch.zeros_like(x))
    yield LinearCase("a row of zeros", weight * (torch.arange(6) != 2)[:, None], x)
    yield LinearCase("weights that are all zero", torch.zeros(6, 8), x)
    yield LinearCase("weights and inputs that are all equal", torch.ones(6, 8), torch.ones_like(x))
    yield LinearCase("float16 values", weight.half().float(), x.half().float())
    yield LinearCase("bfloat16 values", weight.bfloat16().float(), x.bfloat16().float())
    # 6e-8 is the smallest number of float16, 65504 its largest.
    yield LinearCase("the smallest float16 values", (weight * 1e-7).half().float(), x / 1000)
    yield LinearCase("large float16 values", weight.clamp(-2, 2) * 3e4, x * 100)


def typical() -> LinearCase:
    """Return the case that has nothing special about it."""
    return next(cases())


def row_targets(out: int, columns: int) -> Iterator[tuple[str, Target]]:
    """Yield targets of counts per row, as they are where rows have no ratios of their own."""
    for ratio, count in ((0.0, 0), (0.5, columns // 2), (0.9, columns - 1), (0.99, columns)):
        yield f"ratio {ratio}", Target(torch.full((out,), count), ratio)
    if columns > 1:  # a remainder that went to every second row
        counts = torch.full((out,), columns // 2) + torch.arange(out) % 2
        yield "rows that differ by one", Target(counts, float(counts.sum()) / (out * columns))


def uneven_target(out: int, columns: int) -> tuple[str, Target]:
    """Return a target whose rows have ratios of their own, from none to all of a row."""
    counts = torch.arange(out) * columns // max(out - 1, 1)
    return "ratios per row", Target(counts, float(counts.sum()) / (out * columns))


def matrix_targets(out: int, columns: int) -> Iterator[tuple[str, Target]]:
    """Yield targets of one count for the matrix."""
    n = out * columns
    for ratio, count in ((0.0, 0), (0.5, n // 2), (0.9, n - 1), (0.99, n)):
        target = Target(torch.tensor([count]), ratio, comparison="matrix")
        yield f"ratio {ratio} of the matrix", target


def pattern_targets(out: int, columns: int) -> Iterator[tuple[str, Target]]:
    """Yield targets of every N:M pattern that divides the columns; 4:4 keeps everything."""
    for kept, of in ((2, 4), (1, 4), (4, 4), (4, 8), (1, 2)):
        if columns % of == 0:
            pattern, pruned = Pattern(kept, of), of - kept
            counts = torch.full((out,), pruned * (columns // of))
            yield f"pattern {pattern}", Target(counts, pruned / of, pattern)


def targets(out: int, columns: int, can: PrunerTraits) -> Iterator[tuple[str, Target]]:
    """Yield every target that a pruner of these traits may be given."""
    yield from row_targets(out, columns)
    if can.row_ratios:
        yield uneven_target(out, columns)
    yield from matrix_targets(out, columns)
    if can.patterns:
        yield from pattern_targets(out, columns)


def work(can: PrunerTraits) -> Iterator[tuple[str, LinearCase, Target]]:
    """Yield every target with the typical case, and the others with one of theirs."""
    first, *others = cases()
    for name, target in targets(*first.shape, can):
        yield f"{first.name}, {name}", first, target
    for case in others:
        name, target = list(row_targets(*case.shape))[1]
        yield f"{case.name}, {name}", case, target


def layouts() -> Iterator[tuple[str, Layout]]:
    """Yield layouts that a model may have, the typical one first."""
    yield "four blocks", models.layout(4)
    yield "one block", models.layout(1)
    yield "one linear", models.layout(1, {"only": (3, 5)})
    yield "one weight in every block", models.layout(3, {"only": (1, 1)})
    yield "linears of one row and of one column", models.layout(2, {"a": (1, 4), "b": (4, 1)})


BLOCKS = {
    "typical": lambda out, columns, seed: (
        random(out, columns, seed=seed),
        inputs(columns, seed=seed),
    ),
    "equal": lambda out, columns, seed: (random(out, columns), inputs(columns)),
    "dead": lambda out, columns, seed: (torch.zeros(out, columns), torch.zeros(2, 3, columns)),
}


def block_data(
    block: Block, kind: str, required: Iterable[str | Accumulator], device: str = "cpu"
) -> tuple[Mapping[str, Tensor], Mapping[str, Statistics]]:
    """Return weights and statistics of a block's linears: `typical`, `equal` or `dead`."""
    weights, statistics, seen = {}, {}, list(required)
    for k, x in enumerate(block.linears):
        seed = 100 * block.index + k
        weight, data = BLOCKS[kind](x.out_features, x.in_features, seed)
        weights[x.name] = weight.to(device)
        statistics[x.name] = models.collect(data.to(device), *seen)
    return weights, statistics


def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield dense and pruned inputs `(windows, tokens, in)` of one linear, with what is special."""
    x = inputs(6)
    noise = random(*x.shape, seed=7)
    yield TYPICAL, x, x + noise / 2
    yield "inputs that hardly differ", x, x * (1 + 1e-4 * noise)
    yield "inputs that are twice as loud", x, 2 * x
    yield "a pruned run that is silent", x, torch.zeros_like(x)
    yield "a dense run that is silent", torch.zeros_like(x), x
    yield "two silent runs", torch.zeros_like(x), torch.zeros_like(x)
    yield "one input", x[..., :1].clone(), x[..., 1:2].clone()
    yield "one token", x[:1, :1].clone(), x[:1, 1:2].clone()
    yield "float16 values", x.half().float(), (x + noise).half().float()
    yield "the smallest float16 values", (x * 1e-7).half().float(), (x * 2e-7).half().float()
    yield "large float16 values", x.clamp(-2, 2) * 3e4, noise.clamp(-2, 2) * 3e4


def logits() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield dense and pruned logits `(windows, tokens, words)`, with what is special."""
    dense, noise = 2 * random(3, 5, 11, seed=1), random(3, 5, 11, seed=2)
    yield TYPICAL, dense, dense + noise
    yield "logits that hardly differ", dense, dense * (1 + 1e-4 * noise)
    yield "one window of one token", dense[:1, :1].clone(), noise[:1, :1].clone()
    yield "logits that are all equal", torch.zeros(2, 3, 11), torch.ones(2, 3, 11)
    yield "float16 logits", dense.half(), (dense + noise).half()
    yield "bfloat16 logits", dense.bfloat16(), (dense + noise).bfloat16()
    yield "large float16 logits", (1000 * dense).half(), (1000 * noise).half()
    yield "larger logits", 1e5 * dense, 1e5 * noise

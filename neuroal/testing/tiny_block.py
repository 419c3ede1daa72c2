"""A pruned block of four linears, its batches, and what a dense model has behind it, made by hand.

Everything is made anew, and alike, by every call: a plugin that writes to its inputs spoils nobody
else's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from neuroal.layout import Block
from neuroal.testing import cases, models

HIDDEN = 4
INNER = 6
SIZES = (2, 2, 1)  # windows of the batches
TOKENS = 5


def output(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return h + down(silu(up(h))) with h = x + o(tanh(q(x))), which autograd differentiates.

    Args:
        weights: `(out, in)` of `blocks.0.q`, `blocks.0.o`, `blocks.0.up` and `blocks.0.down`.
        x: `(windows, tokens, 4)`.

    Returns:
        `(windows, tokens, 4)`.
    """
    q, o, up, down = (weights[f"blocks.0.{name}"] for name in ("q", "o", "up", "down"))
    h = x + torch.tanh(x @ q.t()) @ o.t()
    return h + silu(h @ up.t()) @ down.t()


@dataclass(frozen=True, eq=False)
class TinyBatch:
    """A `BlockBatch` of the tiny block.

    Attributes:
        x: float32 `(windows, tokens, 4)`, what the pruned blocks before it hand on.
        target: Of the same shape, the dense model's output.
        weights: By linear name, where a run is given none.
        runs: How many windows each run had, so far.
    """

    x: Tensor
    target: Tensor
    weights: Mapping[str, Tensor]
    runs: list[int]

    @property
    def windows(self) -> int:
        """Return the number of windows."""
        return len(self.x)

    def run(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the block's output with these weights."""
        self.runs.append(self.windows)
        return output({**self.weights, **weights}, self.x)


@dataclass(frozen=True, eq=False)
class BlockCase:
    """A tiny block before it is reconstructed.

    Attributes:
        name: What is special about it.
        dense: float32 `(out, in)` by linear name.
        masks: bool `(out, in)` of the linears that are pruned, True = pruned.
        x: float32 `(windows, tokens, 4)`, before the dense block.
        moved: What is added to `x` before the pruned block.
        sizes: Windows of the batches.
    """

    name: str
    dense: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    x: Tensor
    moved: Tensor
    sizes: Sequence[int] = field(default=SIZES)

    @property
    def block(self) -> Block:
        """Return the block's description."""
        shapes = {name.split(".")[-1]: _shape(weight) for name, weight in self.dense.items()}
        return models.layout(1, shapes).blocks[0]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the linears that are pruned, 0 where they are."""
        return {name: self.dense[name].masked_fill(mask, 0) for name, mask in self.masks.items()}

    @property
    def batches(self) -> list[TinyBatch]:
        """Return all batches, which share no tensor, and write down their runs together."""
        runs: list[int] = []
        sizes = list(self.sizes)
        targets = torch.split(output(self.dense, self.x), sizes)
        given = torch.split(self.x + self.moved, sizes)
        weights = {**self.dense, **self.weights}
        return [
            TinyBatch(x.clone(), y.clone(), {n: w.clone() for n, w in weights.items()}, runs)
            for x, y in zip(given, targets, strict=True)
        ]

    def to(self, device: str) -> BlockCase:
        """Return a copy on a device."""
        return replace(
            self,
            dense={n: w.to(device) for n, w in self.dense.items()},
            masks={n: m.to(device) for n, m in self.masks.items()},
            x=self.x.to(device),
            moved=self.moved.to(device),
        )


def block_cases() -> Iterator[BlockCase]:
    """Yield blocks that a model may have, the typical one first."""
    shapes = {"q": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
    shapes |= {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    dense = {f"blocks.0.{n}": cases.random(*s, seed=k) for k, (n, s) in enumerate(shapes.items())}
    masks = {n: w.abs() < w.abs().median() for n, w in dense.items()}
    x = cases.random(sum(SIZES), TOKENS, HIDDEN, seed=20)
    typical = BlockCase(cases.TYPICAL, dense, masks, x, cases.random(*x.shape, seed=21) / 4)
    yield typical
    yield replace(typical, name="one batch", sizes=(sum(SIZES),))
    yield replace(typical, name="a window in every batch", sizes=(1,) * sum(SIZES))
    one = replace(typical, x=x[:1, :1].clone(), moved=typical.moved[:1, :1].clone(), sizes=(1,))
    yield replace(one, name="one token")
    yield replace(typical, name="inputs of the dense model's own", moved=torch.zeros_like(x))
    nothing = {n: torch.zeros_like(m) for n, m in masks.items()}
    yield replace(typical, name="nothing pruned", masks=nothing)
    nearly = {n: w.abs() < w.abs().max() for n, w in dense.items()}
    yield replace(typical, name="all but one weight of a linear pruned", masks=nearly)
    everything = {n: torch.ones_like(m) for n, m in masks.items()}
    yield replace(typical, name="everything pruned", masks=everything)
    some = {n: m for n, m in masks.items() if not n.endswith(".o")}
    yield replace(typical, name="a linear that is not pruned", masks=some)
    silent = torch.zeros_like(x)
    yield replace(typical, name="inputs that are all zero", x=silent, moved=silent)
    zeros = {n: torch.zeros_like(w) for n, w in dense.items()}
    yield replace(typical, name="weights that are all zero", dense=zeros, masks=everything)
    half = {n: w.half().float() for n, w in dense.items()}
    yield replace(typical, name="float16 values", dense=half, x=x.half().float())
    yield replace(typical, name="large float16 values", x=x.clamp(-2, 2) * 3e4)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]

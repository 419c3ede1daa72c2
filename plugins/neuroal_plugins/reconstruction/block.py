"""Block reconstruction: the surviving weights of a block, trained towards its dense output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import (
    Accumulator,
    Block,
    BlockBatch,
    Linear,
    ReconstructionTraits,
    Statistics,
    hookimpl,
    option,
)
from neuroal_plugins.reconstruction.refit import Refit

BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False)
class BlockReconstruction:
    """Adam on one block at a time (EBFT, arXiv:2402.12419; 3BASiL, arXiv:2603.01376).

    It minimises the mean squared distance between the pruned block's output on the pruned model's
    inputs and the dense block's on the dense model's. Windows held back end the training: the
    values that are best on them stay. Linears are refitted first.
    """

    passes: int = option(8, "over the windows, at most")
    rate: float = option(
        0.01, "first step, times the root mean square of a linear's surviving weights"
    )
    held: int = option(4, "every so many-th batch is held back")
    patience: int = option(2, "passes without gain on what is held back before the training ends")
    tokens: int = option(512, "of a batch")
    refit: bool = option(True, "refit the linears first, as the plugin refit does")

    def __post_init__(self) -> None:
        for name in ("passes", "patience", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.held < 2:
            raise ValueError(f"held {self.held} is less than 2")
        if not self.rate > 0:
            raise ValueError(f"rate {self.rate} is not positive")

    @hookimpl
    def describe(self) -> ReconstructionTraits:
        """Return the size of a batch, and how often it runs: to be trained on, or measured."""
        return ReconstructionTraits(batch_tokens=self.tokens, passes=self.passes + 1)

    @hookimpl
    def required_statistics(self) -> frozenset[str | Accumulator]:
        """Return what the refit reads."""
        return Refit().required_statistics() if self.refit else frozenset()

    @hookimpl
    def reconstruct_linear(
        self, weight: Tensor, mask: Tensor, values: Tensor, statistics: Statistics, linear: Linear
    ) -> Tensor:
        """Return the refitted values."""
        if not self.refit:
            return values
        return Refit().reconstruct_linear(weight, mask, values, statistics, linear)

    @hookimpl
    def reconstruct_block(
        self,
        block: Block,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        batches: Sequence[BlockBatch],
        rng: torch.Generator,
    ) -> Mapping[str, Tensor]:
        """Return the values that are best on the batches held back; the last ones without any."""
        held = range(self.held - 1, len(batches), self.held) if len(batches) > 1 else range(0)
        if len(batches) > 1 and not held:
            held = range(len(batches) - 1, len(batches))
        used = [i for i in range(len(batches)) if i not in held]
        kept = {name: (~mask).to(weights[name]) for name, mask in masks.items()}
        values = {name: w.clone().requires_grad_(True) for name, w in weights.items()}
        adam = torch.optim.Adam(
            [{"params": [v], "lr": self.rate * _rms(v, kept[n])} for n, v in values.items()],
            betas=BETAS,
        )
        steps = self.passes * len(used)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        )
        best, least, since = dict(weights), _loss([batches[i] for i in held], values), 0
        for _ in range(self.passes):
            for i in torch.randperm(len(used), generator=rng).tolist():
                loss = _distance(batches[used[i]], values)
                gradients = torch.autograd.grad(loss, list(values.values()))
                for (name, v), gradient in zip(values.items(), gradients, strict=True):
                    v.grad = gradient * kept[name]
                adam.step()
                cosine.step()
                with torch.no_grad():
                    for name, v in values.items():
                        v.mul_(kept[name])
            now = _loss([batches[i] for i in held], values)
            since = 0 if now < least else since + 1
            if now < least or not held:
                best, least = {name: v.detach().clone() for name, v in values.items()}, now
            elif since >= self.patience:
                break
        return best


def _rms(values: Tensor, kept: Tensor) -> float:
    """Return the root mean square of the surviving weights."""
    return math.sqrt(float(values.detach().square().sum()) / max(float(kept.sum()), 1.0))


def _distance(batch: BlockBatch, values: Mapping[str, Tensor]) -> Tensor:
    """Return the mean squared distance to the dense block's output."""
    return (batch.run(values) - batch.target).square().mean()


def _loss(batches: Sequence[BlockBatch], values: Mapping[str, Tensor]) -> float:
    """Return the mean distance over the windows of some batches; 0 without any."""
    with torch.no_grad():
        total = sum(float(_distance(batch, values)) * batch.windows for batch in batches)
    return total / max(sum(batch.windows for batch in batches), 1)

"""Low-rank changes of the weights that survive: W + M ⊙ (B A)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuroal.errors import UsageError
from neuroal.layout import find, selected


class _Change(nn.Module):
    """W + M ⊙ (B A), where M keeps the places in which W is not zero."""

    pruned: Tensor

    def __init__(self, weight: Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        bound = 1 / math.sqrt(columns)  # as LoRA draws A (Hu et al. 2021, section 4.1); B is zero
        drawn = torch.rand((*stack, rank, columns), generator=rng).mul_(2 * bound).sub_(bound)
        self.a = nn.Parameter(drawn.to(weight.device))  # (..., rank, columns), float32
        self.b = nn.Parameter(torch.zeros((*stack, rows, rank), device=weight.device))
        self.register_buffer("pruned", weight == 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        # In place: each copy of all targets that is made and left costs as much as the product.
        return (self.b @ self.a).masked_fill_(self.pruned, 0).add_(weight).to(weight.dtype)


class MaskedLora:
    """Low-rank changes of a model's linears, whose factors alone are trained.

    Attributes:
        model: Its linears compute with W + M ⊙ (B A).
        parameters: Every A and B, float32, by name in the model.
    """

    def __init__(self, model: nn.Module, rank: int, parameters: Iterable[str], seed: int) -> None:
        """Put changes of some rank on parameters by name, and freeze all others."""
        self.model = model
        rng = torch.Generator().manual_seed(seed)
        self._trained = {p: p.requires_grad for p in model.parameters()}
        self._places = [(model.get_submodule(n.rpartition(".")[0]), n) for n in parameters]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for module, name in self._places:
            change = _Change(model.get_parameter(name).detach(), rank, rng)
            parametrize.register_parametrization(module, name.rpartition(".")[2], change)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def merge(self) -> nn.Module:
        """Return the model as it was made, with the changes in its weights.

        They are the very numbers that the linears computed with, in the weights' dtype: pruned
        weights are zero, and no output changes.
        """
        return self._end(merged=True)

    def remove(self) -> nn.Module:
        """Return the model as it was before."""
        return self._end(merged=False)

    def _end(self, merged: bool) -> nn.Module:
        for module, name in self._places:
            parametrize.remove_parametrizations(
                module, name.rpartition(".")[2], leave_parametrized=merged
            )
        self._places = []
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)
        return self.model


def masked_lora(
    model: nn.Module, rank: int, targets: Iterable[str] = (), *, seed: int = 0
) -> MaskedLora:
    """Train low-rank changes of the weights that survive pruning: W + M ⊙ (B A).

    W is frozen. A of shape (rank, in) is drawn as LoRA does (Hu et al. 2021, arXiv:2106.09685), B
    of shape (out, rank) is zero at first, M is zero where W is: so merging is exact, and the merged
    weights have the zeros of W. Unlike LoRA without a mask, the product is made whole in every
    forward pass, which takes the memory of one more copy of the targets in float32.

    Args:
        model: A causal language model in memory.
        rank: Of every change, at least 1.
        targets: Patterns of linears, as for `neuroal prune --only`; none means all of the blocks.
            A linear in a stack of experts stands for the stack.
        seed: Of the draws.

    Returns:
        The changes; all other parameters of the model are frozen until `merge` or `remove`.

    Raises:
        UsageError: The rank is below 1, or a pattern means no linear.
    """
    if rank < 1:
        raise UsageError(f"rank {rank} is too low: give at least 1")
    layout = find(model)
    patterns = tuple(targets)
    names = selected(layout, patterns, "target") if patterns else layout.linears.keys()
    parameters = dict.fromkeys(x.place.parameter for n, x in layout.linears.items() if n in names)
    return MaskedLora(model, rank, parameters, seed)

"""Zeros that stay zero while a model is trained, whatever the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class KeptZeros:
    """The zeros of a model, kept until `remove` or the end of the `with` block.

    Gradients are set to zero there as they come, so that neither momentum nor the norm by which
    gradients are clipped has a part of them; and after every step of an optimiser of torch the
    weights are set to zero there, so that nothing else it does (noise, or momentum from before)
    moves them.

    Attributes:
        masks: bool, True = stays zero, by parameter name and in the parameter's shape.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note the zeros of a model as they are now, and keep them from here on."""
        self.masks: dict[str, Tensor] = {}
        self._kept: dict[nn.Parameter, Tensor] = {}
        for name, parameter in _matrices(model):
            zero = parameter.detach() == 0
            count = int(zero.sum())
            if 0 < count < zero.numel():  # all zero is not pruned yet to be learnt: B of a LoRA
                self.masks[name] = self._kept[parameter] = zero
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._clear_gradient
            )
            for parameter in self._kept
        ]
        self._hooks.append(register_optimizer_step_post_hook(self._after_step))

    @property
    def zeros(self) -> int:
        """Return how many weights are kept at zero."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def apply(self) -> None:
        """Set the weights to zero again: after a step of an optimiser that is not torch's."""
        self._clear(self._kept)

    def remove(self) -> None:
        """Let the zeros go; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _clear_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.masked_fill_(self._mask(parameter), 0)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        own = (p for group in optimizer.param_groups for p in group["params"])
        self._clear(p for p in own if p in self._kept)

    @torch.no_grad()
    def _clear(self, parameters: Any) -> None:
        for parameter in parameters:
            parameter.masked_fill_(self._mask(parameter), 0)

    def _mask(self, parameter: Any) -> Tensor:
        mask = self._kept[parameter]
        if mask.device != parameter.device:  # the model was moved meanwhile
            mask = self._kept[parameter] = mask.to(parameter.device)
        return mask


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keep the zeros of a model at zero while it is trained by any optimiser.

    They are the entries that are exactly zero now, in every parameter of two or more dimensions
    that is trained; embeddings and the head, which are never pruned, aside. A matrix that is zero
    altogether is left alone: it is not pruned but about to be learnt.

        kept = keep_zeros(model)
        ...  # any loop; optimizer.step() needs no change
        kept.remove()

    Args:
        model: In memory, whole: parameters that are sharded over devices are not found.

    Returns:
        A handle, which is a context manager too.
    """
    return KeptZeros(model)


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the matrices that are trained, by name, without those of the vocabulary."""
    vocabulary = {
        id(p) for x in model.modules() if isinstance(x, nn.Embedding) for p in (x.weight,)
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1 and id(parameter) not in vocabulary:
            yield name, parameter

"""What a fine-tuning will take: memory by a formula, time by a step that is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError
from neuroal.layout import Layout
from neuroal.model import pretrained
from neuroal.model.memory import available_memory
from neuroal.units import size

_ACTIVATIONS = 68  # bytes per token, hidden unit and block: 34 in half precision, see `memory`
_LOGITS = 4  # copies in float32: themselves, their log-softmax, the gradients of both
_SHORT = 5.0  # seconds of a first step that is timed again, without what comes once


@dataclass(frozen=True)
class TrainingCost:
    """What a fine-tuning will take.

    Attributes:
        memory: Bytes.
        seconds: Of all steps that are still to come.
    """

    memory: int
    seconds: float


def memory(
    model: nn.Module, layout: Layout, *, tokens: int, lora: int | None, dtype: str, teacher: int
) -> int:
    """Return about how many bytes a fine-tuning takes.

    Weights in `dtype`; of those that are trained, the gradient and AdamW's two moments too; for
    low-rank changes one more copy of the matrices that they change; activations as in Korthikanti
    et al. 2022 (arXiv:2205.05198, eq. 2: 34 bytes per token and hidden unit in half precision,
    without attention's square), and logits.

    Args:
        model: May be without weights.
        layout: Its layout.
        tokens: Of a batch.
        lora: The rank; None trains all weights.
        dtype: Of the weights.
        teacher: Bytes of the dense model where one is learnt from.
    """
    config: Any = pretrained.text_config(getattr(model, "config", None))
    each = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    parameters = sum(p.numel() for p in model.parameters())
    held = each * parameters + teacher
    if lora is None:
        held += 3 * each * parameters + layout.weights  # a byte of each mask
    else:
        ends = sum(x.in_features + x.out_features for x in layout.linears.values())
        held += 16 * lora * ends + 5 * layout.weights
    activations = _ACTIVATIONS * tokens * len(layout.blocks) * int(config.hidden_size)
    logits = _LOGITS * 4 * tokens * (pretrained.vocabulary_size(config) or 0)
    return held + activations + logits * (2 if teacher else 1)


def check_memory(needed: int, device: str) -> None:
    """Refuse a fine-tuning that has not enough memory.

    Raises:
        NeuroalError: It says what helps.
    """
    free = available_memory(device)
    if free is not None and needed > free:
        raise NeuroalError(
            f"fine-tuning would take about {size(needed)} of memory, and {size(free)} are free: "
            "give --lora, a smaller --batch or --length, or --dtype bfloat16"
        )


def seconds_per_step(loss: Callable[[Tensor], Tensor], batch: Tensor, model: nn.Module) -> float:
    """Return about how long a step takes, by a forward and a backward pass that change nothing."""

    def timed() -> float:
        start = time.perf_counter()
        loss(batch).backward()  # type: ignore[no-untyped-call]
        if batch.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    training = model.training
    model.train()
    with torch.random.fork_rng(devices=[batch.device] if batch.is_cuda else []):
        seconds = timed()
        if seconds < _SHORT:
            seconds = timed()
    model.train(training)
    model.zero_grad(set_to_none=True)
    return seconds

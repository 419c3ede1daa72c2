"""Adapters that peft has trained without masks, merged so that zeros stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError, UsageError

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """A pruned model with an adapter in its weights, and what the masks have cost.

    Attributes:
        model: The model, without anything of peft.
        lost: The share of the adapter that fell on pruned weights and is not in the model, in
            [0, 1]: Σ‖(1 − M) ⊙ Δ‖² / Σ‖Δ‖² over all matrices, with squared Frobenius norms.
        matrices: The same of every matrix, by the name of its module.
    """

    model: nn.Module
    lost: float
    matrices: Mapping[str, float]


@torch.no_grad()
def merge_under_mask(model: nn.Module, adapter: str | Path) -> MergedAdapter:
    """Add a peft adapter to the surviving weights of a pruned model: W + M ⊙ Δ.

    What the adapter would have changed in pruned weights is lost; an adapter that was trained with
    `masked_lora` instead loses nothing.

    Args:
        model: The pruned model in memory, which is changed.
        adapter: Folder of the adapter, of any kind that adds a matrix to a weight (LoRA and its
            like).

    Returns:
        The model, and what it loses.

    Raises:
        UsageError: peft is not installed, or the folder holds no such adapter.
        NeuroalError: It does not fit the model.
    """
    folder = Path(adapter)
    if not (folder / _WEIGHTS).is_file():
        raise UsageError(f"'{folder}' is no adapter of peft: it holds no {_WEIGHTS}")
    peft: Any = _peft()
    config = peft.PeftConfig.from_pretrained(str(folder))
    if getattr(config, "use_dora", False):
        raise UsageError(f"'{folder}' is a DoRA, which scales weights beside adding to them")
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise NeuroalError(f"adapter '{folder}' does not fit the model: {first}") from error
    lost: dict[str, tuple[float, float]] = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = layer.get_param() if hasattr(layer, "get_param") else layer.base_layer.weight
            lost[name] = _add(weight, layer.get_delta_weight(*layer.active_adapters))
    if not lost:
        raise UsageError(f"'{folder}' adds no matrix to a weight: its kind cannot be merged")
    bare = wrapped.unload()
    for name, parameter in bare.named_parameters():
        if name in zeros and bool((parameter[zeros[name]] != 0).any()):
            raise NeuroalError(f"adapter '{folder}' replaces '{name}' as a whole: zeros are lost")
    total = sum(whole for _, whole in lost.values())
    gone = sum(part for part, _ in lost.values())
    shares = {name: part / whole if whole else 0.0 for name, (part, whole) in lost.items()}
    return MergedAdapter(bare, gone / total if total else 0.0, shares)


def _add(weight: Tensor, change: Tensor) -> tuple[float, float]:
    """Add a change where a weight is not zero; return the squared norm of the rest, and of all."""
    rest = change.double().masked_fill(weight != 0, 0)
    weight.copy_(weight.float() + change.float().masked_fill(weight == 0, 0))
    return float(rest.square().sum()), float(change.double().square().sum())


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("peft is not installed: pip install 'neuroal[finetune]'") from None
    return peft

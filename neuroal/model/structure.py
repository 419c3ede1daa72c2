"""What would be pruned in a model, in memory or on disk, without loading its weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from neuroal.layout import Layout, find
from neuroal.model import pretrained


def layout(model: nn.Module | str | Path, trust_remote_code: bool = False) -> Layout:
    """Return the blocks and linears of a model, without loading its weights.

    Args:
        model: A causal language model in memory, a folder, a hub name, or "demo".
        trust_remote_code: Let the model's own code run.

    Raises:
        NeuroalError: It cannot be read, or no decoder blocks are found in it.
    """
    if isinstance(model, nn.Module):
        return find(model)
    return find(pretrained.skeleton(str(model), trust_remote_code))

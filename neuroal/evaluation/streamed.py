"""The losses of a model whose blocks are in memory one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from neuroal.data.windows import Windows
from neuroal.evaluation.perplexity import (
    check_vocabulary,
    cross_entropy,
    embedding_of,
    forward_windows,
    window_bar,
)
from neuroal.walk import Walker


def streamed_losses(
    walker: Walker, windows: Windows, ids: Tensor, at_once: int, *, progress: bool = False
) -> Tensor:
    """Return what `window_losses` does, by blocks that are opened one after the other.

    Args:
        walker: Opens the blocks; its block runs count those of the evaluation too.
        windows: What the windows are from.
        ids: Those to measure, int64 `(windows, length)`.
        at_once: How many of their tokens pass a block before the next, and have their states held
            together; rounded down to whole forward passes, but for one.
        progress: Show a bar.

    Returns:
        float32 `(windows,)` on the CPU.

    Raises:
        NeuroalError: A token id is beyond the model's vocabulary.
    """
    vocabulary = len(embedding_of(walker.model))
    check_vocabulary(windows, vocabulary)
    batch = forward_windows(ids.shape[1], vocabulary)
    passes = max(at_once // (batch * ids.shape[1]), 1)
    losses = []
    with torch.no_grad(), window_bar(len(ids), progress) as bar:
        for part in torch.split(ids, passes * batch):
            inputs = walker.inputs(part, batch=batch)
            state = walker.through(inputs)
            for tokens, outputs in zip(inputs.batches, state.outputs, strict=True):
                losses.append(cross_entropy(walker.logits(tokens, outputs), tokens).cpu())
                bar.update(len(tokens))
    return torch.cat(losses)

"""Divergence of the model's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import hookimpl

CHUNK = 128  # tokens in float32 at a time: 64 MiB at 128 k words


@dataclass(frozen=True, eq=False)
class OutputKl:
    """KL(dense || pruned) of the next-token distributions, mean over windows and tokens.

    The selection cost of EvoPress (Sieberling et al. 2024, arXiv:2410.14649).
    """

    @hookimpl
    def measure_output(self, dense_logits: Tensor, pruned_logits: Tensor) -> Tensor:
        """Return the mean divergence in nats, float32, of logits `(windows, tokens, words)`."""
        words = dense_logits.shape[-1]
        dense, pruned = dense_logits.reshape(-1, words), pruned_logits.reshape(-1, words)
        starts = range(0, dense.shape[0], CHUNK)
        # Made before the chunks: what is made between them keeps the allocator from their memory.
        sums = dense.new_empty(len(starts), dtype=torch.float32)
        for k, i in enumerate(starts):
            sums[k] = _divergence(dense[i : i + CHUNK].float(), pruned[i : i + CHUNK].float())
        mean = sums.sum() / dense.shape[0]
        return mean.clamp_min(0)  # rounding may leave -1e-8


def _divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    p, q = dense.log_softmax(dim=-1), pruned.log_softmax(dim=-1)  # (tokens, words)
    # A word that the dense model excludes has p log p = 0, not 0 * inf.
    terms = (p.exp() * (p - q)).where(p != -torch.inf, 0)
    return terms.sum()

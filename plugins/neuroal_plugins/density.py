"""From scores to ratios: the arithmetic that NeuroAL, OWL and DLP share.

Every function works in float64 in the published order of operations: `d * ratio` may lie exactly on
an integer, and then the last bit decides how many weights a row loses.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = 0.01, 0.99


def spread(scores: Tensor, lam: float, ratio: float) -> Tensor:
    """Return ratios around `ratio`, the lower the higher the score, `2 * lam` apart at most.

    density = 2 lam (score - min) / (max - min) - mean(same term) + (1 - ratio), and the result is
    1 - density (OWL, Yin et al. 2024; NeuroAL, Cunegatti et al. 2025).

    Args:
        scores: Finite, `(n,)`, any real dtype and device.
        lam: Half the distance between the highest and the lowest ratio.
        ratio: Mean of the result.

    Returns:
        float64 `(n,)` on the CPU, not clipped; `ratio` everywhere if all scores are equal.
    """
    g = scores.detach().cpu().double()
    low, high = float(g.min()), float(g.max())
    if low == high:
        return torch.full_like(g, ratio)
    g = (g - low) * (1 / (high - low) * lam * 2)
    return 1 - (g - _mean(g) + (1 - ratio))


def linear_schedule(blocks: int, lam: float, sparsity: float) -> list[float]:
    """Return `sparsity - lam + 2 lam b / (blocks - 1)` for every block b, clipped.

    Args:
        blocks: Number of blocks, at least 1; one block gets `sparsity`.
        lam: Distance of the first and of the last block from `sparsity`.
        sparsity: Ratio of the middle of the model, in [0, 1).
    """
    ratios = spread(torch.arange(1, blocks + 1), lam, sparsity)
    return clip_block_ratios(ratios.sort().values)


def clip_block_ratios(ratios: Tensor) -> list[float]:
    """Return ratios with 0.01 in place of those <= 0, and 0.99 in place of those >= 1."""
    clipped = ratios.where(ratios > 0, LOWEST)
    return [float(ratio) for ratio in clipped.where(ratios < 1, HIGHEST)]


def clip_row_ratios(ratios: Tensor) -> Tensor:
    """Return ratios clipped to [0.01, 0.99]."""
    return ratios.clamp(LOWEST, HIGHEST)


def _mean(g: Tensor) -> float:
    # numpy adds in pairs, torch in vector lanes; the published bits are numpy's.
    return float(g.numpy().mean())


def check_lambdas(lambdas: tuple[float, ...]) -> None:
    """Refuse an empty list, and a number outside [0, 1), with a ValueError."""
    if not lambdas:
        raise ValueError("lambdas is empty: give at least one")
    for lam in lambdas:
        if not 0 <= lam < 1:
            raise ValueError(f"lam={lam} is outside [0, 1)")

"""Exact masks from scores: the k smallest go, ties by index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neuroal.hookspecs import Pattern, Target


def row_mask(scores: Tensor, counts: Tensor, prune_last: bool = False) -> Tensor:
    """Return the mask that prunes the `counts[i]` smallest scores of row i.

    Args:
        scores: Finite floating `(rows, columns)`.
        counts: int64 `(rows,)`, or `(1,)` for one that holds in every row; in [0, columns].
        prune_last: Of equal scores the one of higher index goes, else that of lower index.

    Returns:
        bool `(rows, columns)`, True = pruned, with exactly `counts[i]` in row i.
    """
    counts = counts.to(scores.device).expand(scores.shape[0])
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ordered = _sorted_rows(scores)
    last = ordered.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))  # (rows, 1) largest pruned
    below = scores < last
    need = (counts - below.sum(dim=1)).unsqueeze(1)  # (rows, 1) how many of the equal ones go
    equal = scores == last
    if bool((equal.sum(dim=1, keepdim=True) == need).all()):
        return below | equal
    if prune_last:
        rank = equal.flip(1).cumsum(dim=1).flip(1)
    else:
        rank = equal.cumsum(dim=1)
    return below | (equal & (rank <= need))


def _sorted_rows(scores: Tensor) -> Tensor:
    """Return every row in rising order; on the CPU by NumPy, whose sort of values is vectorised."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    exact = scores if scores.dtype == torch.float64 else scores.float()  # half precision fits
    return torch.from_numpy(np.sort(exact.detach().numpy(), axis=1)).to(scores.dtype)


def pattern_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the N:M mask: of every M consecutive inputs the N of highest score stay.

    Args:
        scores: Finite floating `(out, in)`; M divides `in`.
        pattern: N kept of M.

    Returns:
        bool `(out, in)`, True = pruned; of equal scores the lower index goes.
    """
    groups = scores.reshape(-1, pattern.of)
    return row_mask(groups, torch.tensor([pattern.of - pattern.kept])).view_as(scores)


def mask_for(scores: Tensor, target: Target) -> Tensor:
    """Return the mask of a linear's scores that meets a target.

    Args:
        scores: Finite floating `(out, in)`, higher = keep.
        target: Counts per row or for the matrix, or a pattern.

    Returns:
        bool `(out, in)`, True = pruned.
    """
    if target.pattern is not None:
        return pattern_mask(scores, target.pattern)
    if target.comparison == "matrix":
        flat = scores.reshape(1, -1)
        return row_mask(flat, target.counts, target.prune_last).view_as(scores)
    return row_mask(scores, target.counts, target.prune_last)

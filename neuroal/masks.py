"""Exact masks from scores: the k smallest go, ties by index."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroal.hookspecs import Pattern, Target

CHUNK = 1 << 16  # scores that are looked at together: they stay in the processor's cache

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_mask(scores: Tensor, counts: Tensor, prune_last: bool = False) -> Tensor:
    """Return the mask that prunes the `counts[i]` smallest scores of row i.

    Args:
        scores: Finite floating `(rows, columns)`.
        counts: int64 `(rows,)`, or `(1,)` for one that holds in every row; in [0, columns].
        prune_last: Of equal scores the one of higher index goes, else that of lower index.

    Returns:
        bool `(rows, columns)`, True = pruned, with exactly `counts[i]` in row i.
    """
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type != "cpu":
        counts = counts.to(scores.device, non_blocking=True).expand(scores.shape[0])
        return _mask_on_device(scores, counts, prune_last)
    exact = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    values = exact.numpy()  # half precision fits into float32
    wanted = counts.cpu().expand(scores.shape[0]).numpy()
    mask = np.empty(values.shape, dtype=np.bool_)
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        _mask_rows(values[rows], wanted[rows], prune_last, mask[rows])
    return torch.from_numpy(mask)


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of a weight that is 0 where the mask is True and keeps its bits elsewhere."""
    if weight.device.type != "cpu":
        return weight.masked_fill(mask, 0)
    # A logical and with all bits or none: several times faster than a choice between two values.
    bits = weight.detach().view(_BITS[weight.element_size()]).numpy()
    kept = mask.numpy().view(np.int8) - np.int8(1)  # -1 has all bits set
    return torch.from_numpy(bits & kept).view(weight.dtype)


def kernels_for(weight: Tensor, target: Target) -> ModuleType | None:
    """Return `neuroal.kernels` if it can prune a weight on its device to a target, else None."""
    fits = target.pattern is None and target.comparison == "row" and weight.element_size() <= 4
    if weight.device.type != "cuda" or not fits or importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("neuroal.kernels")
    return kernels if weight.shape[1] <= kernels.WIDEST else None


def _mask_rows(
    values: NDArray[np.floating], counts: NDArray[np.int64], last: bool, mask: NDArray[np.bool_]
) -> None:
    """Write the mask of a few rows into `mask`."""
    highest, following = _boundary(values, counts)
    np.less_equal(values, highest, out=mask)
    tied = np.flatnonzero(highest == following)  # more scores are equal than may go
    if len(tied):
        below, equal = values[tied] < highest[tied], values[tied] == highest[tied]
        left = counts[tied, None] - below.sum(axis=1, keepdims=True)
        rank = (equal[:, ::-1] if last else equal).cumsum(axis=1)
        mask[tied] = below | (equal & ((rank[:, ::-1] if last else rank) <= left))


def _boundary(
    values: NDArray[np.floating], counts: NDArray[np.int64]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the largest score of every row that goes and the smallest that stays, `(rows, 1)`.

    Rows that lose equally many need a selection; for those that differ, NumPy's vectorised sort of
    values is faster than selecting in each row alone.
    """
    columns = values.shape[1]
    k = int(counts[0])
    if 0 < k < columns and (counts == k).all():
        parted = np.partition(values, k - 1, axis=1)
        return parted[:, k - 1 : k], parted[:, k:].min(axis=1, keepdims=True)
    ordered = np.sort(values, axis=1)
    k_column = counts[:, None]
    highest = np.take_along_axis(ordered, np.maximum(k_column - 1, 0), axis=1)
    following = np.take_along_axis(ordered, np.minimum(k_column, columns - 1), axis=1)
    return (
        np.where(k_column > 0, highest, -np.inf),
        np.where(k_column < columns, following, np.inf),
    )


def _mask_on_device(scores: Tensor, counts: Tensor, last: bool) -> Tensor:
    """Return the mask by whole-tensor operations, without waiting for the device."""
    ordered = scores.sort(dim=1).values
    highest = ordered.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))  # (rows, 1)
    below, equal = scores < highest, scores == highest
    left = (counts - below.sum(dim=1)).unsqueeze(1)  # (rows, 1) how many of the equal ones go
    rank = (equal.flip(1) if last else equal).cumsum(dim=1)
    return below | (equal & ((rank.flip(1) if last else rank) <= left))


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

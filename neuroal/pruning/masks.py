"""Exact masks from scores: the k smallest are pruned, ties by index."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroal.types import Pattern, Target

# Scores that are processed together: they stay in the cache, and one thread processes them.
# From 1 << 15 on torch would wake more threads for each operation, which takes longer than the
# operation itself.
CHUNK = (1 << 15) - 1

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_mask(scores: Tensor, counts: Tensor, prune_last: bool = False) -> Tensor:
    """Return the mask that prunes the `counts[i]` smallest scores of row i.

    Args:
        scores: Finite floating `(rows, columns)`.
        counts: int64 `(rows,)`, or `(1,)` for one that holds in every row; in [0, columns].
        prune_last: Of equal scores the one of higher index is pruned, else that of lower index.

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


def prune_rows(
    weight: Tensor, scores: Tensor, counts: Tensor, prune_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a weight without the `counts[i]` smallest scores of row i.

    On a CPU a few rows at a time are scored, selected and pruned while they are in its cache; on a
    CUDA device with Triton one kernel does the same, and nothing waits for it.

    Args:
        weight: Floating `(rows, columns)`.
        scores: Floating `(rows, columns)`; or float32 `(columns,)`, by which |W|, in float32, is
            multiplied to give the scores.
        counts: int64 `(rows,)`, or `(1,)` for one that holds in every row; in [0, columns].
        prune_last: Of equal scores the one of higher index is pruned, else that of lower index.

    Returns:
        A new weight, 0 where pruned and of the same bits elsewhere, and whether all scores are
        finite, 0-d bool: if not, the values of the weight are undefined.
    """
    if weight.device.type == "cpu":
        return _prune_rows(weight.detach(), scores.detach(), counts.cpu(), prune_last)
    kernels = _kernels(weight, scores)
    if kernels is None:
        return _prune_rows_whole(weight, scores, counts, prune_last)
    everywhere = counts.to(weight.device, non_blocking=True).expand(len(weight))
    pruned, finite = kernels.prune_rows(weight, scores, everywhere, prune_last)
    return pruned, finite.all()


def _prune_rows_whole(
    weight: Tensor, scores: Tensor, counts: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """Prune by whole-tensor operations, on a device without a kernel."""
    if scores.dim() == 1:
        scores = weight.float().abs() * scores  # (rows, columns)
    return zeroed(weight, row_mask(scores, counts, last)), scores.isfinite().all()


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of a weight that is 0 where the mask is True and keeps its bits elsewhere."""
    if weight.device.type != "cpu":
        return weight.masked_fill(mask, 0)
    bits = weight.detach().view(_BITS[weight.element_size()]).numpy()
    return torch.from_numpy(_cut(bits, mask.numpy())).view(weight.dtype)


def _cut(
    bits: NDArray[np.integer], mask: NDArray[np.bool_], out: NDArray[np.integer] | None = None
) -> NDArray[np.integer]:
    """Return a weight's bits, 0 where the mask is True.

    A bitwise and with all bits or none is several times faster than a choice between two values.
    """
    kept = mask.view(np.int8) - np.int8(1)  # -1 has all bits set
    cut: NDArray[np.integer] = np.bitwise_and(bits, kept, out=out)
    return cut


def _kernels(weight: Tensor, scores: Tensor) -> ModuleType | None:
    """Return `neuroal.pruning.kernels` if it can prune a weight on its device, else None."""
    fits = max(weight.element_size(), scores.element_size()) <= 4
    if weight.device.type != "cuda" or not fits or importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("neuroal.pruning.kernels")
    return kernels if weight.shape[1] <= kernels.WIDEST else None


def _prune_rows(
    weight: Tensor, scores: Tensor, counts: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """Prune in pieces that fit into the processor's cache."""
    out, finite = torch.empty(weight.shape, dtype=weight.dtype), True
    if not weight.numel():
        return out, torch.tensor(finite)
    kind = _BITS[weight.element_size()]
    before, after = weight.view(kind).numpy(), out.view(kind).numpy()
    wanted = counts.expand(len(weight)).numpy()
    step = max(1, CHUNK // weight.shape[1])
    products = torch.empty(step, weight.shape[1])  # |W| times the scores of its columns
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        if scores.dim() == 1:
            part = products[: len(before[rows])].copy_(weight[rows]).abs_().mul_(scores)
        else:
            part = scores[rows]
            part = part if part.dtype == torch.float64 else part.float()
        values = part.numpy()
        finite &= bool(np.isfinite(values.min()) and np.isfinite(values.max()))
        mask = np.empty(values.shape, dtype=np.bool_)
        _mask_rows(values, wanted[rows], last, mask)
        _cut(before[rows], mask, after[rows])
    return out, torch.tensor(finite)


def _mask_rows(
    values: NDArray[np.floating], counts: NDArray[np.int64], last: bool, mask: NDArray[np.bool_]
) -> None:
    """Write the mask of a few rows into `mask`."""
    highest, following = _boundary(values, counts)
    np.less_equal(values, highest, out=mask)
    tied = np.flatnonzero(highest == following)  # more scores are equal than are pruned
    if len(tied):
        below, equal = values[tied] < highest[tied], values[tied] == highest[tied]
        left = counts[tied, None] - below.sum(axis=1, keepdims=True)
        rank = (equal[:, ::-1] if last else equal).cumsum(axis=1)
        mask[tied] = below | (equal & ((rank[:, ::-1] if last else rank) <= left))


def _boundary(
    values: NDArray[np.floating], counts: NDArray[np.int64]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the largest pruned and the smallest kept score of every row, `(rows, 1)` each.

    Rows of equal counts need one selection; for counts that differ, NumPy's vectorised sort of
    values is faster than a selection in each row.
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
    left = (counts - below.sum(dim=1)).unsqueeze(1)  # (rows, 1): how many of the equal ones go
    rank = (equal.flip(1) if last else equal).cumsum(dim=1)
    return below | (equal & ((rank.flip(1) if last else rank) <= left))


def pattern_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the N:M mask: of every M consecutive inputs the N of highest score stay.

    Args:
        scores: Finite floating `(out, in)`; M divides `in`.
        pattern: N kept of M.

    Returns:
        bool `(out, in)`, True = pruned; of equal scores the lower index is pruned.
    """
    groups = scores.reshape(-1, pattern.of)
    return row_mask(groups, torch.tensor([pattern.of - pattern.kept])).view_as(scores)


def mask_for(scores: Tensor, target: Target) -> Tensor:
    """Return the mask of a linear's scores that meets a target.

    Args:
        scores: Finite floating `(out, in)`, higher = keep.
        target: Counts per row or for the matrix, or a pattern. Its zeros go first, whatever their
            scores, where they have the shape of the scores; in an N:M group, all of them.

    Returns:
        bool `(out, in)`, True = pruned.
    """
    whole = target.comparison == "matrix" and target.pattern is None
    if whole and target.importance is not None:
        scores = scores * target.importance.rows.to(scores.device)[:, None]
        if target.importance.inputs is not None:
            scores = scores * target.importance.inputs.to(scores.device)
    zeros = None
    if target.zeros is not None and target.zeros.shape == scores.shape:
        zeros = target.zeros.to(scores.device)
        scores = scores.masked_fill(zeros, -torch.inf)
    if target.pattern is not None:
        mask = pattern_mask(scores, target.pattern)
        return mask if zeros is None else mask | zeros
    if whole:
        flat = scores.reshape(1, -1)
        return row_mask(flat, target.counts, target.prune_last).view_as(scores)
    return row_mask(scores, target.counts, target.prune_last)


def with_zeros(mask: Tensor, scores: Tensor, target: Target) -> Tensor:
    """Return a plugin's mask with the zeros that stay, and as many weights pruned as before.

    Of what it prunes besides, the weights of highest score stay in their place.

    Args:
        mask: bool `(out, in)`, True = pruned, as the target asks.
        scores: Finite floating `(out, in)`.
        target: Its zeros are added; without any the mask is as it was.
    """
    if target.zeros is None or bool((mask | ~target.zeros).all()):
        return mask
    if target.budget == "paper":  # whose counts a mask need not have
        return mask | target.zeros
    return mask_for(scores.masked_fill(~mask, torch.inf), target)

"""Selection and pruning in one read and one write of the weight, for CUDA devices.

Imported if a weight is on such a device and Triton is installed; `masks` does the same in torch,
and is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 1 << 16  # columns of a row that one program holds


@triton.jit  # type: ignore[untyped-decorator]
def _prune_row(  # type: ignore[no-untyped-def] # pragma: no cover
    weight, scores, counts, out, finite, columns,
    TIMES: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    start = row.to(tl.int64) * columns
    w = tl.load(weight + start + place, mask=inside, other=0)
    if TIMES:  # scores is (columns,): the score is |W| times it
        score = tl.abs(w.to(tl.float32)) * tl.load(scores + place, mask=inside, other=0)
    else:
        score = tl.load(scores + start + place, mask=inside, other=0).to(tl.float32)
    tl.store(finite + row, tl.min((tl.abs(score) < float("inf")).to(tl.int8), axis=0))
    # Integers in the order of the floats; adding 0 makes one zero of the two.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(inside, key, 0x7FFFFFFF)
    # The k-th smallest key, bit by bit from the top: the largest with fewer than k keys below it.
    k = tl.load(counts + row).to(tl.int32)
    edge = tl.where(tl.sum((key < 0).to(tl.int32), axis=0) < k, 0, -2147483648)
    for i in range(31):
        higher = edge + (1 << (30 - i))
        edge = tl.where(tl.sum((key < higher).to(tl.int32), axis=0) < k, higher, edge)
    below, equal = key < edge, key == edge
    left = k - tl.sum(below.to(tl.int32), axis=0)  # how many of the equal ones go
    rank = tl.cumsum(equal.to(tl.int32), axis=0)
    if LAST:
        rank = tl.sum(equal.to(tl.int32), axis=0) - rank + 1
    gone = below | (equal & (rank <= left))
    tl.store(out + start + place, tl.where(gone, 0.0, w).to(w.dtype), mask=inside)


def prune_rows(
    weight: Tensor, scores: Tensor, counts: Tensor, prune_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a weight without the `counts[i]` smallest scores of row i, as `masks.prune_rows`.

    Weight and scores are float32, float16 or bfloat16, counts int64 `(rows,)`.

    Returns:
        The weight, 0 where pruned and of the same bits elsewhere, and int8 `(rows,)`, 1 where all
        scores of a row are finite; the values of other rows are undefined.
    """
    rows, columns = weight.shape
    weight, scores, counts = weight.contiguous(), scores.contiguous(), counts.contiguous()
    out = torch.empty_like(weight)
    finite = torch.ones(rows, dtype=torch.int8, device=weight.device)
    if weight.numel():
        block = triton.next_power_of_2(columns)
        _prune_row[(rows,)](
            weight, scores, counts, out, finite, columns,
            TIMES=scores.dim() == 1, LAST=prune_last, BLOCK=block,
            num_warps=min(32, max(4, block // 512)),
        )  # fmt: skip
    return out, finite

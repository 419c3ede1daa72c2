"""What the second-order pruners share: exact masks, damped Gram matrices and their factors."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from neuroal import Linear, NeuroalError, Statistics, Target, mask_for

log = logging.getLogger(__name__)

LARGEST_DAMPING = 1.0  # times the mean of the diagonal; beyond it H hardly matters
FIRST_RUNG = 1e-3  # where the ladder goes on from a damping of 0

Factor = TypeVar("Factor")


def choose_mask(scores: Tensor, target: Target, fraction: float = 1.0) -> Tensor:
    """Prune the smallest scores that `target` asks for.

    Args:
        scores: `(out, in)`, higher = keep.
        target: Counts per row or for the matrix; under an N:M pattern that alone decides.
        fraction: Of each count only the floor of this fraction is pruned (not under a pattern).

    Returns:
        bool `(out, in)`, True = pruned.
    """
    if fraction < 1 and target.pattern is None:
        counts = (target.counts.double() * fraction).floor().long()
        target = replace(target, counts=counts)
    return mask_for(scores, target)


def prunes_nothing(target: Target) -> bool:
    """Return whether the target keeps every weight."""
    if target.pattern is not None:
        return target.pattern.kept == target.pattern.of
    return int(target.counts.sum()) == 0


def share_out(counts: Tensor, widths: Tensor) -> Tensor:
    """Divide each count in proportion to `widths`, by largest remainder, ties by lower index.

    Args:
        counts: int64 `(rows,)`, >= 0.
        widths: int64 `(parts,)`, > 0.

    Returns:
        int64 `(rows, parts)` that sums to `counts`; a share is at most one off its exact value.
    """
    total = widths.sum()
    exact = counts[:, None] * widths  # times `total`
    shares, remainders = exact // total, exact % total
    left = counts - shares.sum(1)  # (rows,)
    order = remainders.argsort(dim=1, descending=True, stable=True)
    return shares + (order.argsort(dim=1) < left[:, None])


def gram_matrix(statistics: Statistics, linear: Linear) -> Tensor:
    """Return the Gram matrix of a linear's input; the same object for linears that share it.

    Raises:
        NeuroalError: It has NaN or infinite entries.
    """
    gram = statistics["gram"]
    if not bool(gram.isfinite().all()):
        raise NeuroalError(
            f"linear {linear.name}: the Gram matrix of its input is not finite; does the dense "
            "model overflow in this dtype?"
        )
    return gram


def ladder(damping: float) -> Iterator[float]:
    """Yield `damping` and then ten times the last one, up to `LARGEST_DAMPING`."""
    yield damping
    step = damping * 10 if damping > 0 else FIRST_RUNG
    while step <= LARGEST_DAMPING:
        yield step
        step *= 10


def climb(build: Callable[[float], Factor | None], damping: float, linear: Linear) -> Factor:
    """Return `build(damping)` of the lowest rung of the damping ladder at which it is not None.

    Args:
        build: Factorises with a damping; None where that fails.
        damping: The first rung; each further one is logged as a warning.
        linear: Whose matrix it is, for messages.

    Raises:
        NeuroalError: The factorisation failed on every rung.
    """
    rung = damping
    for rung in ladder(damping):
        if rung != damping:
            log.warning(
                "linear %s: its Gram matrix cannot be factorised, damping raised to %g",
                linear.name,
                rung,
            )
        factor = build(rung)
        if factor is not None:
            return factor
    raise NeuroalError(
        f"linear {linear.name}: the Gram matrix of its input could not be factorised with a "
        f"damping of {damping:g} to {rung:g}; more calibration windows or float32 may help"
    )


def cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor | None:
    """Return the Cholesky factor, or None if the matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    return factor if int(info) == 0 and bool(factor.isfinite().all()) else None


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I as a new tensor."""
    diagonal = gram.diagonal()
    return gram + torch.diag((damping * diagonal.mean()).expand_as(diagonal))


_made: dict[tuple[int, object], tuple[weakref.ref[Tensor], int, object]] = {}


def once_per_gram(gram: Tensor, key: object, build: Callable[[], Factor]) -> Factor:
    """Return `build()`, computed once for all linears and candidates that read one Gram matrix.

    A result is held no longer than the Gram matrix itself lives.

    Args:
        gram: The Gram matrix, recognised by identity.
        key: Everything else that decides the result.
        build: Makes the result.
    """
    place, version = (id(gram), key), gram._version
    known = _made.get(place)
    if known is not None and known[0]() is gram and known[1] == version:
        return known[2]  # type: ignore[return-value]
    made = build()
    reference = weakref.ref(gram, lambda _: _made.pop(place, None))
    _made[place] = (reference, version, made)
    return made

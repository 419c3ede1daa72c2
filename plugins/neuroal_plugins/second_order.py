"""What the second-order pruners share: exact masks, damped Gram matrices and their factors.

Linears of one shape are pruned together: `n` of them along the first dimension.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from neuroal import Linear, NeuroalError, PrunedLinear, Statistics, Target, mask_for, row_mask

log = logging.getLogger(__name__)

LARGEST_DAMPING = 1.0  # times the mean of the diagonal; beyond it H hardly matters
FIRST_RUNG = 1e-3  # where the ladder goes on from a damping of 0

Factor = TypeVar("Factor")


def counts_of(targets: Sequence[Target], rows: int) -> Tensor:
    """Return how many weights are pruned, int64 `(n, rows)`; `(n, 1)` where matrices compete."""
    size = rows if targets[0].comparison == "row" else 1
    return torch.stack([target.counts.expand(size) for target in targets])


def zeros_of(targets: Sequence[Target], weights: Tensor) -> Tensor | None:
    """Return the zeros that stay of weights `(n, out, in)`, bool; None where all may change."""
    if all(target.zeros is None for target in targets):
        return None
    none = torch.zeros_like(weights[0], dtype=torch.bool)
    return torch.stack([none if target.zeros is None else target.zeros for target in targets])


def choose_masks(
    scores: Tensor, counts: Tensor, target: Target, zeros: Tensor | None = None
) -> Tensor:
    """Prune the smallest scores of every row, or of every matrix.

    Args:
        scores: `(n, out, in)`, higher = keep.
        counts: int64, one of every row or one of every matrix, in order.
        target: Any of the linears'; its pattern, if it has one, decides instead of `counts`.
        zeros: bool `(n, out, in)`, weights that go before all others; those beyond the counts of an
            N:M group go too.

    Returns:
        bool `(n, out, in)`, True = pruned.
    """
    if zeros is not None:
        scores = scores.masked_fill(zeros, -torch.inf)
    if target.pattern is not None:
        groups = replace(target, zeros=None if zeros is None else zeros.flatten(0, 1))
        return mask_for(scores.flatten(0, 1), groups).view(scores.shape)
    competing = scores.reshape(counts.numel(), -1)
    return row_mask(competing, counts.flatten(), target.prune_last).view(scores.shape)


def prunes_nothing(targets: Sequence[Target]) -> bool:
    """Return whether the linears of one call keep every weight; either all do, or none."""
    pattern = targets[0].pattern
    if pattern is not None:
        return pattern.kept == pattern.of
    return int(targets[0].counts.sum()) == 0


def untouched(weights: Tensor) -> list[PrunedLinear]:
    """Return the answers that keep every weight of `(n, out, in)`."""
    return [PrunedLinear(x, torch.zeros_like(x, dtype=torch.bool)) for x in weights.clone()]


def factors(
    build: Callable[[Tensor, Linear], tuple[Tensor, ...]],
    key: object,
    statistics: Sequence[Statistics],
    linears: Sequence[Linear],
) -> tuple[Tensor, ...]:
    """Return the factors of every linear's Gram matrix, each part `(n, ...)`.

    Linears that share a Gram matrix share its factors: computed once, stored once.

    Args:
        build: Computes the factors of a Gram matrix; the linear is for messages.
        key: Everything else that decides the result.
        statistics: One a linear.
        linears: Whose they are.

    Raises:
        NeuroalError: A Gram matrix cannot be factorised.
    """
    per_linear = []
    for known, linear in zip(statistics, linears, strict=True):
        gram = known["gram"]
        per_linear.append(once_per_gram(gram, key, partial(build, gram, linear)))
    if all(x is per_linear[0] for x in per_linear):
        return tuple(part.expand(len(per_linear), *part.shape) for part in per_linear[0])
    return tuple(torch.stack(parts) for parts in zip(*per_linear, strict=True))


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
    return factor if bool((info == 0) & factor.isfinite().all()) else None


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I as a new tensor."""
    diagonal = gram.diagonal()
    return gram + torch.diag((damping * diagonal.mean()).expand_as(diagonal))


_computed: dict[tuple[int, object], tuple[weakref.ref[Tensor], int, object]] = {}


def once_per_gram(gram: Tensor, key: object, build: Callable[[], Factor]) -> Factor:
    """Return `build()`, computed once for all linears and candidates that read one Gram matrix.

    A result is held no longer than the Gram matrix itself lives.

    Args:
        gram: The Gram matrix, recognised by identity.
        key: Everything else that decides the result.
        build: Makes the result.
    """
    place, version = (id(gram), key), gram._version
    known = _computed.get(place)
    if known is not None and known[0]() is gram and known[1] == version:
        return known[2]  # type: ignore[return-value]
    result = build()
    reference = weakref.ref(gram, lambda _: _computed.pop(place, None))
    _computed[place] = (reference, version, result)
    return result

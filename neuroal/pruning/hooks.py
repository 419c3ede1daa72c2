"""The hooks of pruners and refiners, called on spare weights; every answer is checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from neuroal.layout import Linear
from neuroal.plugins import Plugin, checks
from neuroal.pruning.masks import with_zeros, zeroed
from neuroal.types import PrunedLinear, Target
from neuroal.walk.statistics import Statistics
from neuroal.walk.unchecked import Unchecked

BATCH_BYTES = 1 << 28  # of float32 weights and Gram matrices that are pruned together


def rng_for(seed: int, *names: str) -> torch.Generator:
    """Return a CPU generator seeded from `seed` and names: role, plugin, linear."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def score(pruner: Plugin, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
    """Return scores `(out, in)` of a spare float32 weight; whether they are finite is not checked.

    Raises:
        PluginError: The pruner failed, or returned another shape or dtype.
    """
    scores: Tensor = pruner.call(
        "score_weights", weight=weight, statistics=statistics, linear=linear
    )
    checks.check(pruner, "score_weights", linear, scores)
    return scores


def refine(
    refiner: Plugin,
    linear: Linear,
    weight: Tensor,
    mask: Tensor,
    scores: Tensor,
    statistics: Statistics,
    target: Target,
) -> Tensor:
    """Return a refined mask, bool `(out, in)`, that meets an exact target as `mask` does.

    The zeros that stay are in it.

    Raises:
        PluginError: The refiner failed, or its mask does not.
    """
    refined: Tensor = refiner.call(
        "refine_mask",
        weight=weight,
        mask=mask,
        scores=scores,
        target=target,
        statistics=statistics,
        linear=linear,
    )
    checks.check_mask(refiner, "refine_mask", linear, refined, target)
    return with_zeros(refined, scores, target)


def update_hook(pruner: Plugin) -> str | None:
    """Return the hook by which a pruner updates the weights that stay; None if it only scores."""
    hooks = ("prune_linears", "prune_linear")
    return next((hook for hook in hooks if pruner.has(hook)), None)


def updates_weights(pruner: Plugin) -> bool:
    """Return whether a pruner updates the weights that stay, and does not only score them."""
    return update_hook(pruner) is not None


def batches(
    pruner: Plugin, linears: Sequence[Linear], targets: Mapping[str, Target]
) -> Iterator[list[Linear]]:
    """Yield linears that one call of a pruner may update together."""
    alike: dict[object, list[Linear]] = {}
    for x in linears:
        target = targets[x.name]
        kind = (target.pattern, target.comparison, target.budget, target.prune_last)
        shape = (x.out_features, x.in_features)
        alike.setdefault((shape, kind, bool(target.counts.any())), []).append(x)
    for group in alike.values():
        size = 4 * group[0].in_features * (group[0].out_features + group[0].in_features)
        step = max(1, BATCH_BYTES // size) if update_hook(pruner) == "prune_linears" else 1
        yield from (group[start : start + step] for start in range(0, len(group), step))


def update(
    pruner: Plugin,
    seed: int,
    linears: Sequence[Linear],
    weights: Tensor,
    statistics: Sequence[Statistics],
    targets: Sequence[Target],
) -> list[PrunedLinear]:
    """Return spare float32 weights `(n, out, in)` as a pruner updates them, 0 where it prunes.

    Rows of importance c are multiplied by c before the pruner sees them, and divided by c after:
    the pruner's error counts c times as much in them.

    Raises:
        PluginError: The pruner failed, or returned a wrong shape, dtype, value or mask.
    """
    scaled = _times_importance(weights, targets)  # (n, out, in)
    unweighed = [replace(target, importance=None) for target in targets]
    rngs = [rng_for(seed, "pruner", pruner.name, x.name) for x in linears]
    if update_hook(pruner) == "prune_linears":
        answers = pruner.call(
            "prune_linears",
            weights=scaled,
            targets=unweighed,
            statistics=statistics,
            linears=linears,
            rngs=rngs,
        )
        many = isinstance(answers, Sequence)
        if not many or len(answers) != len(linears):
            what = f"a list of {len(answers)}" if many else type(answers).__name__
            raise pruner.error(
                "prune_linears",
                f"returned {what}, not a list of {len(linears)} PrunedLinear, for "
                f"'{linears[0].name}' and following: {pruner.cure}",
            )
    else:
        answers = [
            pruner.call(
                "prune_linear",
                weight=scaled[i],
                target=unweighed[i],
                statistics=statistics[i],
                linear=linear,
                rng=rngs[i],
            )
            for i, linear in enumerate(linears)
        ]
    unchecked = Unchecked()
    checked = [
        _checked_update(pruner, linear, target, answer, unchecked)
        for linear, target, answer in zip(linears, targets, answers, strict=True)
    ]
    unchecked.look()
    return [
        _with_zeros(answer, weight, target)
        for weight, target, answer in zip(weights, targets, checked, strict=True)
    ]


def _times_importance(weights: Tensor, targets: Sequence[Target]) -> Tensor:
    """Return weights `(n, out, in)` with every row multiplied by its importance, if it has any."""
    if all(target.importance is None for target in targets):
        return weights
    alike = torch.ones(weights.shape[1])
    rows = [alike if t.importance is None else t.importance.rows for t in targets]
    return weights * torch.stack(rows).to(weights.device)[:, :, None]  # (n, out, 1)


def _checked_update(
    pruner: Plugin, linear: Linear, target: Target, answer: object, unchecked: Unchecked
) -> PrunedLinear:
    """Return a pruner's answer for one linear, unscaled; its values are still to be looked at."""
    hook = update_hook(pruner) or ""
    if not isinstance(answer, PrunedLinear):
        raise checks.wrong(pruner, hook, linear, f"returned {type(answer).__name__}")
    checks.check(pruner, hook, linear, answer.weight)
    weight, mask = answer.weight.float(), answer.mask
    if target.importance is not None:
        weight = weight / target.importance.rows.to(weight.device)[:, None]  # (out, 1)
    about = (pruner, hook, linear)
    unchecked.add(checks.finite(weight), partial(checks.wrong, *about, checks.NOT_FINITE))
    meets = checks.meets(*about, mask, target)
    unchecked.add(meets, partial(checks.off_target, *about, mask, target))
    return PrunedLinear(weight, mask)


def _with_zeros(answer: PrunedLinear, dense: Tensor, target: Target) -> PrunedLinear:
    """Return a pruner's answer with the zeros that stay, and 0 where it prunes.

    Where the pruner knows nothing of them, the largest weights that it has pruned in their place
    come back with their dense values.
    """
    weight, mask = answer.weight, with_zeros(answer.mask, dense.abs(), target)
    if mask is not answer.mask:
        weight = torch.where(answer.mask, dense, weight)
    return PrunedLinear(zeroed(weight, mask), mask)

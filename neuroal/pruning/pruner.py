"""A base pruner and its refiner on the linears of a block: score, mask, refine, or update."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from neuroal.layout import Block, Linear, matrices
from neuroal.plugins import Plugin, checks
from neuroal.pruning import hooks
from neuroal.pruning.masks import mask_for, prune_rows, zeroed
from neuroal.types import PrunedLinear, PrunerTraits, Target
from neuroal.walk.statistics import Statistics
from neuroal.walk.unchecked import Unchecked

NONE = Statistics({})


@dataclass(eq=False)
class ScoreCache:
    """Scores of one block, shared by all candidates that prune it.

    Attributes:
        scores: Of every linear, with the statistics that they were made from.
        unchecked: Whether scores are finite; looked at only at the end of the block, so that the
            device is waited for once.
        keep: Whether another candidate may use the scores; if not, they are discarded.
    """

    scores: dict[str, tuple[Statistics, Tensor]] = field(default_factory=dict)
    unchecked: Unchecked = field(default_factory=Unchecked)
    keep: bool = True


@dataclass(frozen=True)
class BasePruner:
    """A pruner, and the refiner of its masks.

    Attributes:
        keeps_zeros: Names of the linears whose zeros stay zero.
    """

    pruner: Plugin
    refiner: Plugin | None
    seed: int
    keeps_zeros: Collection[str] = ()

    def prune_block(
        self,
        block: Block,
        module: nn.Module,
        statistics: Mapping[str, Statistics],
        targets: Mapping[str, Target],
        cache: ScoreCache | None = None,
    ) -> dict[str, Tensor]:
        """Prune every linear of a block that has a target.

        Args:
            block: The block.
            module: Its module, dense; not changed.
            statistics: By linear name; none for a pruner that reads none.
            targets: By linear name.
            cache: Scores of earlier candidates, for later ones; the caller looks at what is
                unchecked in it.

        Returns:
            New weights by linear name, in the model's own dtype.
        """
        scores = cache or ScoreCache(keep=False)
        weights: dict[str, Tensor] = {}
        updated: list[Linear] = []
        linears = [x for x in block.linears if x.name in targets]
        dense = {x.name: matrices.weight(x, module, block.name) for x in linears}  # (out, in)
        targets = {x.name: self._with_zeros(x, dense[x.name], targets[x.name]) for x in linears}
        with torch.no_grad():
            for x in linears:
                weight, target = dense[x.name], targets[x.name]
                known = statistics.get(x.name, NONE)
                if unseen(x, known):
                    weights[x.name] = zeroed(weight, mask_for(weight.float().abs(), target))
                elif hooks.updates_weights(self.pruner):
                    updated.append(x)
                else:  # a weight that is only masked keeps its bits, whatever the dtype
                    weights[x.name] = self._masked(x, weight, known, target, scores)
            for batch in hooks.batches(self.pruner, updated, targets):
                answers = self._update(
                    batch,
                    torch.stack([dense[x.name].float() for x in batch]),  # (n, out, in)
                    [statistics.get(x.name, NONE) for x in batch],
                    [targets[x.name] for x in batch],
                )
                for x, answer in zip(batch, answers, strict=True):
                    weights[x.name] = answer.weight.to(dense[x.name].dtype)
            if cache is None:
                scores.unchecked.look()
        return weights

    def _with_zeros(self, linear: Linear, weight: Tensor, target: Target) -> Target:
        """Return a target that names the zeros of a dense weight, where these stay."""
        return replace(target, zeros=weight == 0) if linear.name in self.keeps_zeros else target

    def _add_check(self, cache: ScoreCache, linear: Linear, finite: Tensor) -> None:
        """Have scores refused that are not finite, when the cache is looked at."""
        error = partial(checks.wrong, self.pruner, "score_weights", linear, checks.NOT_FINITE)
        cache.unchecked.add(finite, error)

    def _masked(
        self,
        linear: Linear,
        weight: Tensor,
        statistics: Statistics,
        target: Target,
        cache: ScoreCache,
    ) -> Tensor:
        """Return a copy of the model's own weight, 0 where a pruner that only scores prunes it."""
        by_row = target.pattern is None and target.comparison == "row"
        if by_row and self.refiner is None and target.zeros is None:
            factor = self.pruner.traits(PrunerTraits).magnitude_times
            if factor is not None:
                scores = statistics[factor]  # (in,)
            else:
                scores = self._scores(linear, weight, statistics, cache)  # (out, in)
            pruned, finite = prune_rows(weight, scores, target.counts, target.prune_last)
            self._add_check(cache, linear, finite)
            return pruned
        scores = self._scores(linear, weight, statistics, cache)
        mask = mask_for(scores, target)  # (out, in)
        if self.refiner is not None:
            cache.unchecked.look()
            spare = _spare(weight)
            mask = hooks.refine(self.refiner, linear, spare, mask, scores, statistics, target)
        return zeroed(weight, mask)

    def _scores(
        self, linear: Linear, weight: Tensor, statistics: Statistics, cache: ScoreCache
    ) -> Tensor:
        """Return scores, made once for all that have the same statistics or need none."""
        if not self.pruner.required_statistics():
            statistics = NONE
        known = cache.scores.get(linear.name)
        if known is None or known[0] is not statistics:
            cache.scores.pop(linear.name, None)
            scores = hooks.score(self.pruner, linear, _spare(weight), statistics)
            known = (statistics, scores)
            self._add_check(cache, linear, checks.finite(scores))
            if cache.keep:
                cache.scores[linear.name] = known
        return known[1]

    def _update(
        self,
        linears: Sequence[Linear],
        weights: Tensor,
        statistics: Sequence[Statistics],
        targets: Sequence[Target],
    ) -> list[PrunedLinear]:
        """Return spare weights `(n, out, in)`, updated by the pruner and refined."""
        pruned = hooks.update(self.pruner, self.seed, linears, weights, statistics, targets)
        if self.refiner is None:
            return pruned
        refined = []
        for i, linear in enumerate(linears):
            weight, old = weights[i], pruned[i].mask
            scores = hooks.score(self.pruner, linear, weight, statistics[i])
            new = hooks.refine(self.refiner, linear, weight, old, scores, statistics[i], targets[i])
            # A weight that comes back takes its dense value; the others keep the pruner's.
            restored = torch.where(old, weight, pruned[i].weight)
            refined.append(PrunedLinear(zeroed(restored, new), new))
        return refined


def unseen(linear: Linear, statistics: Statistics) -> bool:
    """Return whether no token was routed to a linear's expert: it is then pruned by magnitude."""
    return linear.expert is not None and len(statistics) > 0 and not statistics.tokens


def spare_copies(block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies of a block's weights by linear name, for plugins to read."""
    return {x.name: _spare(matrices.weight(x, module, block.name)) for x in block.linears}


def _spare(weight: Tensor) -> Tensor:
    """Return a float32 copy, so that a plugin may write to it."""
    return weight.to(torch.float32, copy=True)

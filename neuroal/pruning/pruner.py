"""One linear: score, mask, refine; every answer of a plugin checked before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from neuroal.layout import Block, Linear
from neuroal.layout import matrices as matrices
from neuroal.plugins import Plugin, checks
from neuroal.pruning.masks import mask_for, prune_rows, zeroed
from neuroal.types import PrunedLinear, PrunerTraits, Target
from neuroal.walk.statistics import Statistics


def generator(seed: int, *names: str) -> torch.Generator:
    """Return a CPU generator seeded from `seed` and names: role, plugin, linear."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


TOGETHER = 1 << 28  # bytes of float32 weights and Gram matrices that are pruned together
MOVERS = ("prune_linears", "prune_linear")  # the hooks of pruners that move weights
_NONE = Statistics({})


@dataclass(eq=False)
class ScoreCache:
    """Scores of one block that the candidates which prune it have in common.

    Attributes:
        scores: Of the last statistics of every linear, which they were made from.
        finite: Whether scores are finite, 0-d bool, not looked at yet: one look at the end of the
            block is one wait for the device.
        keep: Whether another candidate may use the scores: else they are not kept.
    """

    scores: dict[str, tuple[Statistics, Tensor]] = field(default_factory=dict)
    finite: list[tuple[Linear, Tensor]] = field(default_factory=list)
    keep: bool = True


@dataclass(frozen=True)
class BasePruner:
    """A pruner, and the refiner that goes over its masks.

    Attributes:
        pruner: Plugin of role `pruner`.
        refiner: Plugin of role `refiner`, or None.
        seed: The recipe's seed.
    """

    pruner: Plugin
    refiner: Plugin | None
    seed: int

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
            cache: Scores of other candidates, and for them; the caller calls `check_scores` later.

        Returns:
            New weights by linear name, in the model's own dtype.
        """
        scores = cache or ScoreCache(keep=False)
        weights = {}
        moving: list[Linear] = []
        with torch.no_grad():
            for x in block.linears:
                if x.name in targets:
                    known, target = statistics.get(x.name, _NONE), targets[x.name]
                    dense = matrices.weight(x, module, block.name)
                    if unseen(x, known):
                        weights[x.name] = zeroed(dense, mask_for(dense.float().abs(), target))
                    elif self._mover:
                        moving.append(x)
                    else:  # what is only masked keeps its bits, whatever the dtype
                        weights[x.name] = self._cut(x, dense, known, target, scores)
            for batch in self._batches(moving, targets):
                dense = torch.stack([matrices.weight(x, module, block.name).float() for x in batch])
                given = [statistics.get(x.name, _NONE) for x in batch]
                wanted = [targets[x.name] for x in batch]
                pruned = self._move(batch, dense, given, wanted)
                for x, y in zip(batch, pruned, strict=True):
                    dtype = matrices.weight(x, module, block.name).dtype
                    weights[x.name] = y.weight.to(dtype)
            if cache is None:
                self.check_scores(scores)
        return weights

    def prune_linear(
        self, linear: Linear, weight: Tensor, statistics: Statistics, target: Target
    ) -> PrunedLinear:
        """Prune one linear.

        Args:
            linear: Which one.
            weight: float32 `(out, in)`, a spare copy of the dense weight.
            statistics: Of its dense input.
            target: How many weights to prune.

        Returns:
            float32 weight, zero where the mask is True, and the mask.

        Raises:
            PluginError: A plugin failed or answered with a wrong shape, dtype or value.
        """
        with torch.no_grad():
            if unseen(linear, statistics):
                mask = mask_for(weight.abs(), target)
                return PrunedLinear(zeroed(weight, mask), mask)
            if self._mover:
                return self._move([linear], weight[None], [statistics], [target])[0]
            cache = ScoreCache()
            mask = self._mask(linear, weight, statistics, target, cache)
            self.check_scores(cache)
            return PrunedLinear(zeroed(weight, mask), mask)

    def check_scores(self, cache: ScoreCache) -> None:
        """Refuse scores that are not finite; waits for the device once.

        Raises:
            PluginError: The pruner returned NaN or infinity.
        """
        if cache.finite and not bool(torch.stack([flag for _, flag in cache.finite]).all()):
            linear = next(x for x, flag in cache.finite if not bool(flag))
            raise checks.wrong(self.pruner, "score_weights", linear, checks.NOT_FINITE)
        cache.finite.clear()

    def _cut(
        self,
        linear: Linear,
        dense: Tensor,
        statistics: Statistics,
        target: Target,
        cache: ScoreCache,
    ) -> Tensor:
        """Return the model's own weight without what a pruner that only scores prunes."""
        if self.refiner is not None or target.pattern is not None or target.comparison != "row":
            return zeroed(dense, self._mask(linear, dense, statistics, target, cache))
        factor = self.pruner.traits(PrunerTraits).magnitude_times
        if factor is not None:
            scores = statistics[factor]
        else:
            scores = self._cached_scores(linear, dense, statistics, cache)
        pruned, finite = prune_rows(dense, scores, target.counts, target.prune_last)
        cache.finite.append((linear, finite))
        return pruned

    def _mask(
        self,
        linear: Linear,
        weight: Tensor,
        statistics: Statistics,
        target: Target,
        cache: ScoreCache,
    ) -> Tensor:
        """Return the mask of a pruner that only scores."""
        scores = self._cached_scores(linear, weight, statistics, cache)
        mask = mask_for(scores, target)
        if self.refiner is not None:
            self.check_scores(cache)
            mask = self._refine(linear, _spare(weight), mask, scores, statistics, target)
        return mask

    def _cached_scores(
        self, linear: Linear, weight: Tensor, statistics: Statistics, cache: ScoreCache
    ) -> Tensor:
        """Return scores, made once for all that have the same statistics or need none."""
        if not self.pruner.required_statistics():
            statistics = _NONE
        known = cache.scores.get(linear.name)
        if known is None or known[0] is not statistics:
            cache.scores.pop(linear.name, None)
            known = (statistics, self._scores(linear, _spare(weight), statistics))
            cache.finite.append((linear, checks.finite(known[1])))
            if cache.keep:
                cache.scores[linear.name] = known
        return known[1]

    @property
    def _mover(self) -> str | None:
        """Return the hook by which the pruner moves weights; None if it only scores them."""
        return next((hook for hook in MOVERS if self.pruner.has(hook)), None)

    def _batches(
        self, linears: Sequence[Linear], targets: Mapping[str, Target]
    ) -> Iterator[list[Linear]]:
        """Yield linears that one call of the pruner may prune together."""
        alike: dict[object, list[Linear]] = {}
        for x in linears:
            target = targets[x.name]
            kind = (target.pattern, target.comparison, target.budget, target.prune_last)
            shape = (x.out_features, x.in_features)
            alike.setdefault((shape, kind, bool(target.counts.any())), []).append(x)
        for group in alike.values():
            size = 4 * group[0].in_features * (group[0].out_features + group[0].in_features)
            step = max(1, TOGETHER // size) if self._mover == "prune_linears" else 1
            yield from (group[start : start + step] for start in range(0, len(group), step))

    def _move(
        self,
        linears: Sequence[Linear],
        weights: Tensor,
        statistics: Sequence[Statistics],
        targets: Sequence[Target],
    ) -> list[PrunedLinear]:
        """Return what the pruner makes of spare weights `(n, out, in)`, checked and refined.

        Rows of importance c are pruned as rows that are c times as large, and then as small again:
        the pruner's error counts c times as much in them.
        """
        weighed = _times_importance(weights, targets)
        unweighed = [replace(target, importance=None) for target in targets]
        rngs = [generator(self.seed, "pruner", self.pruner.name, x.name) for x in linears]
        if self._mover == "prune_linears":
            given = self.pruner.call(
                "prune_linears",
                weights=weighed,
                targets=unweighed,
                statistics=statistics,
                linears=linears,
                rngs=rngs,
            )
            many = isinstance(given, Sequence)
            if not many or len(given) != len(linears):
                what = f"a list of {len(given)}" if many else type(given).__name__
                raise self.pruner.error(
                    "prune_linears",
                    f"returned {what}, not a list of {len(linears)} PrunedLinear, for "
                    f"'{linears[0].name}' and following: {self.pruner.cure}",
                )
        else:
            given = [
                self.pruner.call(
                    "prune_linear",
                    weight=weight,
                    target=target,
                    statistics=known,
                    linear=linear,
                    rng=rng,
                )
                for weight, target, known, linear, rng in zip(
                    weighed, unweighed, statistics, linears, rngs, strict=True
                )
            ]
        return [
            self._moved(*each)
            for each in zip(linears, weights, statistics, targets, given, strict=True)
        ]

    def _moved(
        self,
        linear: Linear,
        weight: Tensor,
        statistics: Statistics,
        target: Target,
        answer: object,
    ) -> PrunedLinear:
        """Return one answer of the pruner, checked, zero where it prunes, and refined."""
        hook = self._mover or ""
        if not isinstance(answer, PrunedLinear):
            raise checks.wrong(self.pruner, hook, linear, f"returned {type(answer).__name__}")
        checks.check(self.pruner, hook, linear, answer.weight)
        mask, moved = answer.mask, answer.weight.float()
        if target.importance is not None:
            moved = moved / target.importance.rows.to(moved.device)[:, None]
        if not bool(checks.finite(moved)):
            raise checks.wrong(self.pruner, hook, linear, checks.NOT_FINITE)
        checks.check_mask(self.pruner, hook, linear, mask, target)
        if self.refiner is not None:
            scores = self._scores(linear, weight, statistics)
            mask = self._refine(linear, weight, answer.mask, scores, statistics, target)
            # A weight that comes back takes its dense value; the others keep what the pruner gave.
            moved = torch.where(answer.mask, weight, moved)
        return PrunedLinear(zeroed(moved, mask), mask)

    def _scores(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
        scores: Tensor = self.pruner.call(
            "score_weights", weight=weight, statistics=statistics, linear=linear
        )
        checks.check(self.pruner, "score_weights", linear, scores)
        return scores

    def _refine(
        self,
        linear: Linear,
        weight: Tensor,
        mask: Tensor,
        scores: Tensor,
        statistics: Statistics,
        target: Target,
    ) -> Tensor:
        assert self.refiner is not None
        refined: Tensor = self.refiner.call(
            "refine_mask",
            weight=weight,
            mask=mask,
            scores=scores,
            target=target,
            statistics=statistics,
            linear=linear,
        )
        checks.check_mask(self.refiner, "refine_mask", linear, refined, target)
        return refined


def _times_importance(weights: Tensor, targets: Sequence[Target]) -> Tensor:
    """Return weights `(n, out, in)` with every row multiplied by its importance, if it has any."""
    if all(target.importance is None for target in targets):
        return weights
    alike = torch.ones(weights.shape[1])
    rows = [alike if t.importance is None else t.importance.rows for t in targets]
    return weights * torch.stack(rows).to(weights.device)[:, :, None]


def unseen(linear: Linear, statistics: Statistics) -> bool:
    """Return whether a linear is of an expert that no token was routed to: magnitude decides."""
    return linear.expert is not None and len(statistics) > 0 and not statistics.tokens


def spare_copies(block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies of a block's weights by linear name, for plugins to read."""
    return {x.name: _spare(matrices.weight(x, module, block.name)) for x in block.linears}


def _spare(weight: Tensor) -> Tensor:
    """Return a float32 copy that a plugin may do anything with."""
    return weight.to(torch.float32, copy=True)


def updates_weights(pruner: Plugin) -> bool:
    """Return whether a pruner moves the weights that it keeps, and not only scores them."""
    return any(pruner.has(hook) for hook in MOVERS)

"""One linear: score, mask, refine; every answer of a plugin checked before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neuroal import weights as matrices
from neuroal.errors import PluginError
from neuroal.hookspecs import PrunedLinear, PrunerTraits, Target
from neuroal.layout import Block, Linear
from neuroal.masks import mask_for, prune_rows, zeroed
from neuroal.plugins import Plugin
from neuroal.statistics import Statistics


def generator(seed: int, *names: str) -> torch.Generator:
    """Return a CPU generator seeded from `seed` and names: role, plugin, linear."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


NOT_FINITE = "returned NaN or infinity"
_NONE = Statistics({})


@dataclass(eq=False)
class Shared:
    """What the candidates that prune one block have in common.

    Attributes:
        scores: Of the last statistics of every linear, which they were made from.
        finite: Whether scores are finite, 0-d bool, not looked at yet: one look at the end of the
            block is one wait for the device.
        keeps: Whether another candidate may use the scores: else they are not kept.
    """

    scores: dict[str, tuple[Statistics, Tensor]] = field(default_factory=dict)
    finite: list[tuple[Linear, Tensor]] = field(default_factory=list)
    keeps: bool = True


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
        shared: Shared | None = None,
    ) -> dict[str, Tensor]:
        """Prune every linear of a block that has a target.

        Args:
            block: The block.
            module: Its module, dense; not changed.
            statistics: By linear name; none for a pruner that reads none.
            targets: By linear name.
            shared: What other candidates left, and find; then `check_scores` is still to come.

        Returns:
            New weights by linear name, in the model's own dtype.
        """
        moves = self.pruner.has("prune_linear")
        own = shared or Shared(keeps=False)
        weights = {}
        with torch.no_grad():
            for x in block.linears:
                if x.name in targets:
                    known, target = statistics.get(x.name, _NONE), targets[x.name]
                    dense = matrices.weight(x, module, block.name)
                    if unseen(x, known):
                        weights[x.name] = zeroed(dense, mask_for(dense.float().abs(), target))
                    elif moves:
                        pruned = self.prune_linear(x, _spare(dense), known, target)
                        weights[x.name] = pruned.weight.to(dense.dtype)
                    else:  # what is only masked keeps its bits, whatever the dtype
                        weights[x.name] = self._cut(x, dense, known, target, own)
            if shared is None:
                self.check_scores(own)
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
            if not self.pruner.has("prune_linear"):
                shared = Shared()
                mask = self._mask(linear, weight, statistics, target, shared)
                self.check_scores(shared)
                return PrunedLinear(zeroed(weight, mask), mask)
            pruned = self._move(linear, weight, statistics, target)
            if self.refiner is None:
                return pruned
            scores = self._scores(linear, weight, statistics)
            mask = self._refine(linear, weight, pruned.mask, scores, statistics, target)
            # A weight that comes back takes its dense value; the others keep what the pruner gave.
            return PrunedLinear(zeroed(torch.where(pruned.mask, weight, pruned.weight), mask), mask)

    def check_scores(self, shared: Shared) -> None:
        """Refuse scores that are not finite; waits for the device once.

        Raises:
            PluginError: The pruner returned NaN or infinity.
        """
        if shared.finite and not bool(torch.stack([flag for _, flag in shared.finite]).all()):
            linear = next(x for x, flag in shared.finite if not bool(flag))
            raise _wrong(self.pruner, "score_weights", linear, NOT_FINITE)
        shared.finite.clear()

    def _cut(
        self,
        linear: Linear,
        dense: Tensor,
        statistics: Statistics,
        target: Target,
        shared: Shared,
    ) -> Tensor:
        """Return the model's own weight without what a pruner that only scores prunes."""
        if self.refiner is not None or target.pattern is not None or target.comparison != "row":
            return zeroed(dense, self._mask(linear, dense, statistics, target, shared))
        factor = traits(self.pruner).magnitude_times
        if factor is not None:
            scores = statistics[factor]
        else:
            scores = self._shared_scores(linear, dense, statistics, shared)
        pruned, finite = prune_rows(dense, scores, target.counts, target.prune_last)
        shared.finite.append((linear, finite))
        return pruned

    def _mask(
        self,
        linear: Linear,
        weight: Tensor,
        statistics: Statistics,
        target: Target,
        shared: Shared,
    ) -> Tensor:
        """Return the mask of a pruner that only scores."""
        scores = self._shared_scores(linear, weight, statistics, shared)
        mask = mask_for(scores, target)
        if self.refiner is not None:
            self.check_scores(shared)
            mask = self._refine(linear, _spare(weight), mask, scores, statistics, target)
        return mask

    def _shared_scores(
        self, linear: Linear, weight: Tensor, statistics: Statistics, shared: Shared
    ) -> Tensor:
        """Return scores, made once for all that have the same statistics or need none."""
        if not self.pruner.required_statistics():
            statistics = _NONE
        known = shared.scores.get(linear.name)
        if known is None or known[0] is not statistics:
            shared.scores.pop(linear.name, None)
            known = (statistics, self._scores(linear, _spare(weight), statistics))
            shared.finite.append((linear, _finite(known[1])))
            if shared.keeps:
                shared.scores[linear.name] = known
        return known[1]

    def _move(
        self, linear: Linear, weight: Tensor, statistics: Statistics, target: Target
    ) -> PrunedLinear:
        result = self.pruner.call(
            "prune_linear",
            weight=weight,
            target=target,
            statistics=statistics,
            linear=linear,
            rng=generator(self.seed, "pruner", self.pruner.name, linear.name),
        )
        if not isinstance(result, PrunedLinear):
            raise _wrong(self.pruner, "prune_linear", linear, f"returned {type(result).__name__}")
        _check(self.pruner, "prune_linear", linear, result.weight)
        if not bool(_finite(result.weight)):
            raise _wrong(self.pruner, "prune_linear", linear, NOT_FINITE)
        _check_mask(self.pruner, "prune_linear", linear, result.mask, target)
        return PrunedLinear(zeroed(result.weight.float(), result.mask), result.mask)

    def _scores(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
        scores: Tensor = self.pruner.call(
            "score_weights", weight=weight, statistics=statistics, linear=linear
        )
        _check(self.pruner, "score_weights", linear, scores)
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
        _check_mask(self.refiner, "refine_mask", linear, refined, target)
        return refined


def unseen(linear: Linear, statistics: Statistics) -> bool:
    """Return whether a linear is of an expert that no token was routed to: magnitude decides."""
    return linear.expert is not None and len(statistics) > 0 and not statistics.tokens


def spare_copies(block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies of a block's weights by linear name, for plugins to read."""
    return {x.name: _spare(matrices.weight(x, module, block.name)) for x in block.linears}


def _spare(weight: Tensor) -> Tensor:
    """Return a float32 copy that a plugin may do anything with."""
    return weight.to(torch.float32, copy=True)


def traits(pruner: Plugin) -> PrunerTraits:
    """Return what the pruner can be combined with; the defaults where it does not say.

    Raises:
        PluginError: `describe` answered something else.
    """
    if not pruner.has("describe"):
        return PrunerTraits(second_order=pruner.has("prune_linear"))
    result = pruner.call("describe")
    if not isinstance(result, PrunerTraits):
        raise pruner.error("describe", f"returned {type(result).__name__}, not PrunerTraits")
    return result


def _wrong(plugin: Plugin, hook: str, linear: Linear, what: str) -> PluginError:
    return plugin.error(hook, f"{what} for linear '{linear.name}': {plugin.cure}")


def _check(plugin: Plugin, hook: str, linear: Linear, values: object) -> None:
    shape = (linear.out_features, linear.in_features)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise _wrong(plugin, hook, linear, f"returned {_kind(values)}, not a floating tensor")
    if tuple(values.shape) != shape:
        raise _wrong(plugin, hook, linear, f"returned shape {tuple(values.shape)}, not {shape},")


def _finite(values: Tensor) -> Tensor:
    """Return whether all values are finite, as a 0-d bool tensor."""
    if values.device.type == "cpu":
        # Anything not finite shows in the sum, in a fraction of the time.
        flag = values.sum().isfinite()
        if flag:
            return flag
    return values.isfinite().all()


def _check_mask(plugin: Plugin, hook: str, linear: Linear, mask: object, target: Target) -> None:
    shape = (linear.out_features, linear.in_features)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise _wrong(plugin, hook, linear, f"returned mask {_kind(mask)}, not bool {shape},")
    if target.budget != "exact":
        return
    if target.pattern is not None:
        groups = mask.reshape(-1, target.pattern.of).sum(dim=1)
        if bool((groups != target.pattern.of - target.pattern.kept).any()):
            raise _wrong(plugin, hook, linear, f"returned a mask that is not {target.pattern}")
        return
    pruned = mask.sum(dim=1).cpu() if target.comparison == "row" else mask.sum().cpu()
    if bool((pruned != target.counts.cpu()).any()):
        asked, total = int(target.counts.sum()), int(pruned.sum())
        what = f"pruned {total}, not {asked}, weights"
        if total == asked:
            what = "pruned other rows than it was asked to"
        raise _wrong(plugin, hook, linear, what)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__

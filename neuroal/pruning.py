"""One linear: score, mask, refine; every answer of a plugin checked before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroal.errors import PluginError
from neuroal.hookspecs import PrunedLinear, PrunerTraits, Target
from neuroal.layout import Block, Linear
from neuroal.masks import mask_for
from neuroal.plugins import Plugin
from neuroal.statistics import Statistics


def generator(seed: int, *names: str) -> torch.Generator:
    """Return a CPU generator seeded from `seed` and names: role, plugin, linear."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


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
        copies: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        targets: Mapping[str, Target],
    ) -> dict[str, Tensor]:
        """Prune every linear of a block that has a target.

        Args:
            block: The block.
            module: Its module, dense; not changed.
            copies: Its `spare_copies`.
            statistics: By linear name; none for a pruner that reads none.
            targets: By linear name.

        Returns:
            New weights by linear name, in the model's own dtype.
        """
        empty = Statistics({})
        moves = self.pruner.has("prune_linear")
        weights = {}
        for x in block.linears:
            if x.name in targets:
                known = statistics.get(x.name, empty)
                pruned = self.prune_linear(x, copies[x.name], known, targets[x.name])
                dense = weight_of(block, module, x).detach()
                # What is only masked keeps its bits, whatever the dtype.
                masked = dense.masked_fill(pruned.mask, 0)
                weights[x.name] = pruned.weight.to(dense.dtype) if moves else masked
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
            pruned = self._prune(linear, weight, statistics, target)
            if self.refiner is not None:
                pruned = self._refine(linear, weight, statistics, target, pruned)
            return pruned

    def _prune(
        self, linear: Linear, weight: Tensor, statistics: Statistics, target: Target
    ) -> PrunedLinear:
        if not self.pruner.has("prune_linear"):
            mask = mask_for(self._scores(linear, weight, statistics), target)
            return PrunedLinear(weight.masked_fill(mask, 0), mask)
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
        _check_mask(self.pruner, "prune_linear", linear, result.mask, target)
        return PrunedLinear(result.weight.float().masked_fill(result.mask, 0), result.mask)

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
        statistics: Statistics,
        target: Target,
        pruned: PrunedLinear,
    ) -> PrunedLinear:
        assert self.refiner is not None
        mask = self.refiner.call(
            "refine_mask",
            weight=weight,
            mask=pruned.mask,
            scores=self._scores(linear, weight, statistics),
            target=target,
            statistics=statistics,
            linear=linear,
        )
        _check_mask(self.refiner, "refine_mask", linear, mask, target)
        # A weight that comes back takes its dense value; the others keep what the pruner gave.
        kept = torch.where(pruned.mask, weight, pruned.weight)
        return PrunedLinear(kept.masked_fill(mask, 0), mask)


def spare_copies(block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies of a block's weights by linear name, for plugins to read."""
    return {
        x.name: weight_of(block, module, x).detach().to(torch.float32, copy=True)
        for x in block.linears
    }


def weight_of(block: Block, module: nn.Module, linear: Linear) -> nn.Parameter:
    """Return the weight parameter `(out, in)` of a linear inside its block's module."""
    weight = module.get_submodule(linear.name.removeprefix(f"{block.name}.")).weight
    assert isinstance(weight, nn.Parameter)
    return weight


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
    if not bool(torch.isfinite(values).all()):
        raise _wrong(plugin, hook, linear, "returned NaN or infinity")


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

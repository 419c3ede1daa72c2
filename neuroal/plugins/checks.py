"""What is checked of a pruner's and a refiner's answers, and the errors that say what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from neuroal.errors import PluginError
from neuroal.layout import Linear
from neuroal.plugins import Plugin
from neuroal.types import Target

NOT_FINITE = "returned NaN or infinity"


def wrong(plugin: Plugin, hook: str, linear: Linear, what: str) -> PluginError:
    """Return the error that names plugin, hook and linear, and what helps."""
    return plugin.error(hook, f"{what} for linear '{linear.name}': {plugin.cure}")


def check(plugin: Plugin, hook: str, linear: Linear, values: object) -> None:
    """Refuse what is not a floating tensor of the linear's shape."""
    shape = (linear.out_features, linear.in_features)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise wrong(plugin, hook, linear, f"returned {_kind(values)}, not a floating tensor")
    if tuple(values.shape) != shape:
        raise wrong(plugin, hook, linear, f"returned shape {tuple(values.shape)}, not {shape},")


def finite(values: Tensor) -> Tensor:
    """Return whether all values are finite, as a 0-d bool tensor."""
    if values.device.type == "cpu":
        # Anything not finite shows in the sum, in a fraction of the time.
        flag = values.sum().isfinite()
        if flag:
            return flag
    return values.isfinite().all()


def check_mask(plugin: Plugin, hook: str, linear: Linear, mask: object, target: Target) -> None:
    """Refuse what is not a bool mask of the linear's shape that meets an exact target."""
    if not bool(meets(plugin, hook, linear, mask, target)):
        assert isinstance(mask, Tensor)
        raise off_target(plugin, hook, linear, mask, target)


def meets(plugin: Plugin, hook: str, linear: Linear, mask: object, target: Target) -> Tensor:
    """Return whether a mask meets an exact target, as a 0-d bool tensor; refuse other shapes."""
    shape = (linear.out_features, linear.in_features)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise wrong(plugin, hook, linear, f"returned mask {_kind(mask)}, not bool {shape},")
    if target.budget != "exact":
        return mask.new_ones(())
    if target.pattern is None:
        return (_pruned(mask, target) == target.counts.to(mask.device, non_blocking=True)).all()
    groups = mask.reshape(-1, target.pattern.of).sum(dim=1)
    least = target.pattern.of - target.pattern.kept
    fits = groups == least
    if target.zeros is not None:  # a group may have more zeros than the pattern asks for
        there = target.zeros.reshape(-1, target.pattern.of).sum(dim=1)
        fits |= groups == there.clamp(min=least)
    return fits.all()


def off_target(
    plugin: Plugin, hook: str, linear: Linear, mask: Tensor, target: Target
) -> PluginError:
    """Return the error of a mask that does not meet its target."""
    if target.pattern is not None:
        return wrong(plugin, hook, linear, f"returned a mask that is not {target.pattern}")
    asked, total = int(target.counts.sum()), int(_pruned(mask, target).sum())
    what = f"pruned {total}, not {asked}, weights"
    if total == asked:
        what = "pruned other rows than it was asked to"
    return wrong(plugin, hook, linear, what)


def _pruned(mask: Tensor, target: Target) -> Tensor:
    """Return how many are pruned in every row, or in the matrix."""
    return mask.sum(dim=1) if target.comparison == "row" else mask.sum()


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__

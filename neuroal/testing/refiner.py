"""What holds for every refiner."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from neuroal.plugins import Plugin
from neuroal.pruning.masks import mask_for
from neuroal.testing import cases
from neuroal.testing.cases import LinearCase
from neuroal.testing.checks import (
    Conformance,
    devices,
    expect,
    expect_repeatable,
    expect_unchanged,
    situation,
)
from neuroal.types import PrunerTraits, RefinerTraits, Target


class RefinerConformance(Conformance):
    """The checks of a refiner; a subclass has the fixture `plugin`, which returns an instance."""

    role = "refiner"

    def test_is_a_mask(self, plugin: Any) -> None:
        """Its answer is a bool tensor of the weight's shape, on its device."""
        p = self.load(plugin)
        for name, case, target in cases.work(PrunerTraits()):
            with situation(name):
                _expect_mask(_refine(p, case, target), case)

    def test_keeps_ratios(self, plugin: Any) -> None:
        """Every row is left with as many pruned weights as asked, 0 and all too."""
        self._keeps(plugin, cases.row_targets)

    def test_keeps_ratios_per_row(self, plugin: Any) -> None:
        """The same where every row has a ratio of its own."""
        self._keeps(plugin, lambda out, columns: [cases.uneven_target(out, columns)])

    def test_keeps_matrix_ratios(self, plugin: Any) -> None:
        """The matrix is left with as many pruned weights as asked."""
        self._keeps(plugin, cases.matrix_targets)

    def test_keeps_patterns(self, plugin: Any) -> None:
        """Every N:M pattern still holds in every group."""
        self._keeps(plugin, cases.pattern_targets)

    def test_repeats(self, plugin: Any) -> None:
        """The same mask and statistics have the same answer."""
        p = self.load(plugin)
        for name, case, target in cases.work(PrunerTraits()):
            with situation(name):
                expect_repeatable(partial(_refine, p, case, target), "refine_mask")

    def test_leaves_inputs_alone(self, plugin: Any) -> None:
        """Weight, mask, scores, target and statistics are not written to."""
        p = self.load(plugin)
        for name, case, target in cases.work(PrunerTraits()):
            with situation(name):
                arguments = _arguments(p, case, target)
                expect_unchanged(
                    arguments, partial(p.call, "refine_mask", **arguments), "refine_mask"
                )

    def test_other_devices(self, plugin: Any) -> None:
        """It works on a device, and leaves its answer there."""
        p = self.load(plugin)
        for device in devices():
            for name, case, target in cases.work(PrunerTraits()):
                with situation(f"{name}, {device}"):
                    _expect_mask(_refine(p, case.to(device), target), case.to(device))

    def _keeps(self, plugin: Any, targets: cases.Targets) -> None:
        p = self.load(plugin)
        why = p.traits(RefinerTraits).needs_paper_budget
        if why:
            raise SkipTest(f"it keeps no counts: {why}")
        for case in cases.cases():
            for name, target in targets(*case.shape):
                with situation(f"{case.name}, {name}"):
                    mask = _refine(p, case, target)
                    if isinstance(mask, Tensor) and mask.shape == case.weight.shape:
                        _expect_counts(mask, target)


def _expect_counts(mask: Tensor, target: Target) -> None:
    pruned = mask.sum(1)
    if target.pattern is not None:
        groups = mask.reshape(-1, target.pattern.of).sum(1)
        wanted = target.pattern.of - target.pattern.kept
        expect(bool((groups == wanted).all()), f"the refined mask is not {target.pattern}")
    elif target.comparison == "row":
        expect(torch.equal(pruned, target.counts), "a row has other counts than it was asked for")
    else:
        total, wanted = int(pruned.sum()), int(target.counts)
        expect(total == wanted, f"the refined mask prunes {total}, not {wanted}, weights")


def _expect_mask(mask: object, case: LinearCase) -> None:
    if not isinstance(mask, Tensor):
        raise AssertionError(f"refine_mask returned {type(mask).__name__}, not a tensor")
    shape, wanted = tuple(mask.shape), tuple(case.weight.shape)
    expect(mask.dtype == torch.bool, f"the refined mask is {mask.dtype}, not bool")
    expect(shape == wanted, f"the refined mask has shape {shape}, the weight {wanted}")
    expect(mask.device == case.weight.device, f"the refined mask is on {mask.device}")


def _arguments(p: Plugin, case: LinearCase, target: Target) -> dict[str, Any]:
    scores = case.weight.abs() * case.statistics(["input_norm"])["input_norm"]
    return {
        "weight": case.weight,
        "mask": mask_for(scores, target),
        "scores": scores,
        "target": target,
        "statistics": case.statistics(p.required_statistics()),
        "linear": case.linear(),
    }


def _refine(p: Plugin, case: LinearCase, target: Target) -> Any:
    with torch.no_grad():
        return p.call("refine_mask", **_arguments(p, case, target))

"""What holds for every pruner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from neuroal.plugins import Plugin
from neuroal.pruning.hooks import rng_for, update
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
from neuroal.types import PrunedLinear, PrunerTraits, Target


class PrunerConformance(Conformance):
    """The checks of a pruner; a subclass has the fixture `plugin`, which returns an instance."""

    role = "pruner"

    def test_traits(self, plugin: Any) -> None:
        """`describe` says the same every time, and nothing that the hooks belie."""
        p = self.load(plugin)
        can = p.traits(PrunerTraits)
        expect(p.traits(PrunerTraits) == can, "describe differs between two calls")
        expect(can.comparison in ("row", "matrix"), f"describe: comparison is {can.comparison!r}")
        for name in ("row_ratios", "patterns"):
            value = getattr(can, name)
            expect(isinstance(value, bool), f"describe: {name} is {value!r}, not True or False")
        expect(
            can.magnitude_times is None or can.magnitude_times in p.statistic_names(),
            f"describe: magnitude_times is {can.magnitude_times!r}, which is not required",
        )

    def test_scores(self, plugin: Any) -> None:
        """Scores are finite and floating, one per weight, on the weight's device."""
        p = self.load(plugin, "score_weights")
        for case in cases.cases():
            with situation(case.name):
                _expect_scores(_scores(p, case), case)

    def test_scores_on_other_devices(self, plugin: Any) -> None:
        """Scores on a device are there, and those of the CPU to a part in a thousand."""
        p = self.load(plugin, "score_weights")
        for device in devices():
            for case in cases.cases():
                with situation(f"{case.name}, {device}"):
                    _expect_scores(_scores(p, case.to(device)), case.to(device))
            scores, known = _scores(p, cases.typical().to(device)), _scores(p, cases.typical())
            close = torch.allclose(scores.cpu().double(), known.double(), rtol=1e-3)
            expect(close, f"scores on {device} are not those on the CPU")

    def test_scores_repeat(self, plugin: Any) -> None:
        """The same weight and statistics have the same scores, whatever was scored between."""
        p = self.load(plugin, "score_weights")
        expect_repeatable(lambda: _scores(p, cases.typical()), "score_weights")
        first = _scores(p, cases.typical())
        for case in list(cases.cases())[:3]:
            _scores(p, case)
        again = _scores(p, cases.typical())
        expect(torch.equal(first, again), "scores depend on what was scored before")

    def test_scores_leave_inputs_alone(self, plugin: Any) -> None:
        """Weight and statistics are not written to."""
        p = self.load(plugin, "score_weights")
        arguments = _arguments(p, cases.typical())
        expect_unchanged(arguments, partial(p.call, "score_weights", **arguments), "score_weights")

    def test_scores_are_the_product_they_are_said_to_be(self, plugin: Any) -> None:
        """Scores are |W| times the statistic that `describe` names, to the bit."""
        p = self.load(plugin, "score_weights")
        name = p.traits(PrunerTraits).magnitude_times
        if name is None or name not in p.statistic_names():
            raise SkipTest("describe names no statistic that is there")
        for case in cases.cases():
            statistics = case.statistics(p.required_statistics())
            with situation(case.name):
                same = torch.equal(_scores(p, case), case.weight.abs() * statistics[name])
                expect(same, f"scores are not |W| times {name}")

    def test_scores_follow_their_rows(self, plugin: Any) -> None:
        """Rows in another order have their scores in that order, if weights compete in rows."""
        p = self.load(plugin, "score_weights")
        if p.traits(PrunerTraits).comparison != "row":
            raise SkipTest("weights compete in the whole matrix")
        case = cases.typical()
        order = torch.arange(case.weight.shape[0]).flip(0).roll(1)
        moved = LinearCase(case.name, case.weight[order].clone(), case.x)
        expected, actual = _scores(p, case)[order].double(), _scores(p, moved).double()
        expect(torch.allclose(actual, expected, rtol=1e-4), "permuted rows have other scores")

    def test_meets_ratios(self, plugin: Any) -> None:
        """As many weights of every row are pruned as was asked for, 0 and all too."""
        self._meets(plugin, cases.row_targets)

    def test_meets_ratios_per_row(self, plugin: Any) -> None:
        """The same where every row has a ratio of its own."""
        if not self.load(plugin).traits(PrunerTraits).row_ratios:
            raise SkipTest("rows have no ratios of their own")
        self._meets(plugin, lambda out, columns: [cases.uneven_target(out, columns)])

    def test_meets_matrix_ratios(self, plugin: Any) -> None:
        """The same where the whole matrix has one count."""
        self._meets(plugin, cases.matrix_targets)

    def test_meets_patterns(self, plugin: Any) -> None:
        """Every N:M pattern is met in every group."""
        if not self.load(plugin).traits(PrunerTraits).patterns:
            raise SkipTest("no N:M patterns")
        self._meets(plugin, cases.pattern_targets)

    def test_meets_ratios_on_other_devices(self, plugin: Any) -> None:
        """`prune_linear` or `prune_linears` works on a device, and leaves its answer there."""
        p = self.load(plugin, "prune_linear", "prune_linears")
        for device in devices():
            for name, case, target in cases.work(p.traits(PrunerTraits)):
                with situation(f"{name}, {device}"):
                    pruned, wanted = _prune(p, case.to(device), target), torch.device(device).type
                    same = pruned.weight.device.type == pruned.mask.device.type == wanted
                    expect(same, f"{_mover(p)} takes its answer to another device")

    def test_pruned_weights(self, plugin: Any) -> None:
        """Pruned weights are zero, the others finite."""
        p = self.load(plugin, "prune_linear", "prune_linears")
        for name, case, target in cases.work(p.traits(PrunerTraits)):
            with situation(name):
                pruned = _prune(p, case, target)
                expect(pruned.weight.dtype == torch.float32, "weight is not float32")
                expect(not pruned.weight[pruned.mask].any(), "a pruned weight is not zero")
                expect(bool(pruned.weight.isfinite().all()), "a weight is NaN or infinite")

    def test_pruning_nothing(self, plugin: Any) -> None:
        """A ratio of 0 leaves the weights as they are."""
        p = self.load(plugin, "prune_linear", "prune_linears")
        for case in cases.cases():
            for name, target in cases.targets(*case.shape, p.traits(PrunerTraits)):
                if target.counts.any():
                    continue
                with situation(f"{case.name}, {name}"):
                    pruned = _prune(p, case, target).weight.float()
                    same = torch.allclose(pruned, case.weight, rtol=1e-4)
                    expect(same, "pruning nothing moves weights")

    def test_pruning_repeats(self, plugin: Any) -> None:
        """The same weight, target, statistics and `rng` have the same answer."""
        p = self.load(plugin, "prune_linear", "prune_linears")
        for name, target in cases.targets(6, 8, p.traits(PrunerTraits)):
            prune = partial(_prune, p, cases.typical(), target)
            with situation(name):
                expect_repeatable(prune, _mover(p))

    def test_pruning_leaves_inputs_alone(self, plugin: Any) -> None:
        """Weight, target and statistics are not written to."""
        p = self.load(plugin, "prune_linear", "prune_linears")
        for name, target in cases.targets(6, 8, p.traits(PrunerTraits)):
            arguments = _moving(p, [cases.typical()], [target])
            with situation(name):
                expect_unchanged(arguments, partial(p.call, _mover(p), **arguments), _mover(p))

    def test_pruning_together(self, plugin: Any) -> None:
        """`prune_linears` prunes every linear as if it came alone."""
        p = self.load(plugin, "prune_linears")
        together = [
            cases.typical(),
            LinearCase("another weight", cases.random(6, 8, seed=12), cases.typical().x),
            LinearCase("another input", cases.random(6, 8, seed=13), cases.inputs(8, seed=14)),
        ]
        for name, target in cases.targets(6, 8, p.traits(PrunerTraits)):
            pruned = _prune_all(p, together, [target] * len(together))
            for case, answer in zip(together, pruned, strict=True):
                with situation(f"{case.name}, {name}"):
                    alone = _prune(p, case, target)
                    expect(torch.equal(answer.mask, alone.mask), "prunes other weights than alone")
                    same = torch.allclose(answer.weight, alone.weight, rtol=1e-3, atol=1e-5)
                    expect(same, "leaves other weights than alone")

    def _meets(self, plugin: Any, targets: cases.Targets) -> None:
        p = self.load(plugin, "prune_linear", "prune_linears")
        for case in cases.cases():
            statistics = case.statistics(p.required_statistics())
            for name, target in targets(*case.shape):
                with situation(f"{case.name}, {name}"), torch.no_grad():  # the engine's checks
                    weights = case.weight.clone()[None]
                    update(p, 0, [case.linear()], weights, [statistics], [target])


def _mover(p: Plugin) -> str:
    return "prune_linears" if p.has("prune_linears") else "prune_linear"


def _arguments(p: Plugin, case: LinearCase) -> dict[str, Any]:
    linear, statistics = case.linear(), case.statistics(p.required_statistics())
    return {"weight": case.weight, "statistics": statistics, "linear": linear}


def _moving(p: Plugin, together: Sequence[LinearCase], targets: Sequence[Target]) -> dict[str, Any]:
    """Return the arguments of the hook that moves weights; `prune_linear` has one case alone."""
    each = [_arguments(p, case) for case in together]
    rngs = [rng_for(0, "pruner", p.name, arguments["linear"].name) for arguments in each]
    if _mover(p) == "prune_linear":
        return {**each[0], "target": targets[0], "rng": rngs[0]}
    return {
        "weights": torch.stack([arguments["weight"] for arguments in each]),
        "targets": list(targets),
        "statistics": [arguments["statistics"] for arguments in each],
        "linears": [arguments["linear"] for arguments in each],
        "rngs": rngs,
    }


def _scores(p: Plugin, case: LinearCase) -> Tensor:
    with torch.no_grad():
        scores: Tensor = p.call("score_weights", **_arguments(p, case))
    return scores


def _prune(p: Plugin, case: LinearCase, target: Target) -> PrunedLinear:
    return _prune_all(p, [case], [target])[0]


def _prune_all(
    p: Plugin, together: Sequence[LinearCase], targets: Sequence[Target]
) -> Sequence[PrunedLinear]:
    with torch.no_grad():
        pruned = p.call(_mover(p), **_moving(p, together, targets))
    answers = [pruned] if _mover(p) == "prune_linear" else pruned
    for answer in answers:
        if not isinstance(answer, PrunedLinear):
            kind = type(answer).__name__
            raise AssertionError(f"{_mover(p)} returned {kind}, not PrunedLinear")
    return answers


def _expect_scores(scores: object, case: LinearCase) -> None:
    wanted = tuple(case.weight.shape)
    if not isinstance(scores, Tensor):
        raise AssertionError(f"score_weights returned {type(scores).__name__}, not a tensor")
    shape = tuple(scores.shape)
    expect(scores.is_floating_point(), f"scores are {scores.dtype}, not floating")
    expect(shape == wanted, f"scores have shape {shape}, the weight {wanted}")
    expect(bool(scores.isfinite().all()), "a score is NaN or infinite")
    expect(scores.device == case.weight.device, f"scores are on {scores.device}")

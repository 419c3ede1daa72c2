"""What holds for every reconstruction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from neuroal.plugins import Plugin
from neuroal.pruning.hooks import rng_for
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
from neuroal.testing.tiny_block import BlockCase, block_cases
from neuroal.types import PrunerTraits, ReconstructionTraits, Target
from neuroal.walk.statistics import Statistics, resolve

LINEAR, BLOCK = "reconstruct_linear", "reconstruct_block"


class ReconstructionConformance(Conformance):
    """The checks of a reconstruction; a subclass has the fixture `plugin`, which returns one.

    That an answer is closer to the dense model is not among them: on which windows, and by which
    distance, is the plugin's own affair.
    """

    role = "reconstruction"

    def test_traits(self, plugin: Any) -> None:
        """`describe` says the same every time, and numbers that can be."""
        p = self.load(plugin)
        needs = p.traits(ReconstructionTraits)
        expect(p.traits(ReconstructionTraits) == needs, "describe differs between two calls")
        for name, value in asdict(needs).items():
            number = type(value) is int and value > 0
            none = value is None and name == "batch_tokens"
            expect(number or none, f"describe: {name} is {value!r}, not a whole number above 0")

    def test_values(self, plugin: Any) -> None:
        """New values of a linear are finite and floating, one per weight, on its device."""
        p = self.load(plugin, LINEAR)
        for name, case, target in _work():
            with situation(name):
                _expect_values(LINEAR, _reconstruct(p, case, target), case.weight)

    def test_values_after_updates(self, plugin: Any) -> None:
        """The same where the pruner has moved the weights that stay."""
        p = self.load(plugin, LINEAR)
        for name, case, target in _work():
            with situation(name):
                arguments = _arguments(p, case, target)
                arguments["values"] = arguments["values"] * 1.25
                _expect_values(LINEAR, _ask(p, arguments), case.weight)

    def test_values_without_dense_inputs(self, plugin: Any) -> None:
        """The same for an expert, which has no statistics that compare with the dense model."""
        p = self.load(plugin, LINEAR)
        if not any(a.compares for a in resolve(p.required_statistics())):
            raise SkipTest("it reads no statistics that compare with the dense model")
        for name, case, target in _work():
            with situation(name):
                arguments = _arguments(p, case, target)
                arguments["statistics"] = _of_expert(p, case)
                _expect_values(LINEAR, _ask(p, arguments), case.weight)

    def test_values_repeat(self, plugin: Any) -> None:
        """The same linear and statistics have the same values."""
        p = self.load(plugin, LINEAR)
        for name, case, target in _work():
            with situation(name):
                expect_repeatable(partial(_reconstruct, p, case, target), LINEAR)

    def test_values_leave_inputs_alone(self, plugin: Any) -> None:
        """Weight, mask, values, target and statistics are not written to."""
        p = self.load(plugin, LINEAR)
        for name, case, target in _work():
            with situation(name):
                arguments = _arguments(p, case, target)
                expect_unchanged(arguments, partial(_ask, p, arguments), LINEAR)

    def test_values_on_other_devices(self, plugin: Any) -> None:
        """It works on a device, and leaves its answer there."""
        p = self.load(plugin, LINEAR)
        for device in devices():
            for name, case, target in _work():
                with situation(f"{name}, {device}"):
                    there = case.to(device)
                    _expect_values(LINEAR, _reconstruct(p, there, target), there.weight)

    def test_block_values(self, plugin: Any) -> None:
        """New values of a block are by linear name, of linears that are pruned, and as above."""
        p = self.load(plugin, BLOCK)
        for case in block_cases():
            with situation(case.name):
                _expect_block(_reconstruct_block(p, case), case)

    def test_block_runs(self, plugin: Any) -> None:
        """A block runs no more often than `describe` says, by which a run's cost is estimated."""
        p = self.load(plugin, BLOCK)
        passes = p.traits(ReconstructionTraits).passes
        for case in block_cases():
            with situation(case.name):
                arguments = _block_arguments(case)
                _ask_block(p, arguments)
                done, most = sum(arguments["batches"][0].runs), passes * len(case.x)
                expect(
                    done <= most, f"{done} block runs, not {most}: describe says passes={passes}"
                )

    def test_block_values_repeat(self, plugin: Any) -> None:
        """The same block, batches and `rng` have the same values."""
        p = self.load(plugin, BLOCK)
        for case in block_cases():
            with situation(case.name):
                expect_repeatable(partial(_reconstruct_block, p, case), BLOCK)

    def test_block_values_leave_inputs_alone(self, plugin: Any) -> None:
        """Weights, masks and batches are not written to."""
        p = self.load(plugin, BLOCK)
        for case in block_cases():
            with situation(case.name):
                arguments = _block_arguments(case)
                tensors = {k: v for k, v in arguments.items() if k != "batches"}
                given = [tensors, [(b.x, b.target, b.weights) for b in arguments["batches"]]]
                expect_unchanged(given, partial(_ask_block, p, arguments), BLOCK)

    def test_block_values_on_other_devices(self, plugin: Any) -> None:
        """It works on a device, and leaves its answer there."""
        p = self.load(plugin, BLOCK)
        for device in devices():
            for case in block_cases():
                with situation(f"{case.name}, {device}"):
                    there = case.to(device)
                    _expect_block(_reconstruct_block(p, there), there)


def _work() -> Iterator[tuple[str, LinearCase, Target]]:
    return cases.work(PrunerTraits())


def _arguments(p: Plugin, case: LinearCase, target: Target) -> dict[str, Any]:
    scores = case.weight.abs() * case.statistics(["input_norm"])["input_norm"]
    values = case.weight.masked_fill(mask_for(scores, target), 0)
    return {
        "weight": case.weight,
        "mask": values == 0,
        "values": values,
        "target": target,
        "statistics": case.statistics(p.required_statistics()),
        "linear": case.linear(),
    }


def _of_expert(p: Plugin, case: LinearCase) -> Statistics:
    return case.statistics([a for a in resolve(p.required_statistics()) if not a.compares])


def _ask(p: Plugin, arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return p.call(LINEAR, **arguments)


def _reconstruct(p: Plugin, case: LinearCase, target: Target) -> Any:
    return _ask(p, _arguments(p, case, target))


def _block_arguments(case: BlockCase) -> dict[str, Any]:
    return {
        "block": case.block,
        "weights": case.weights,
        "masks": {name: mask.clone() for name, mask in case.masks.items()},
        "batches": case.batches,
    }


def _ask_block(p: Plugin, arguments: dict[str, Any]) -> Any:
    with torch.enable_grad():
        return p.call(BLOCK, **arguments, rng=rng_for(0, p.role, p.name, arguments["block"].name))


def _reconstruct_block(p: Plugin, case: BlockCase) -> Any:
    return _ask_block(p, _block_arguments(case))


def _expect_values(hook: str, values: object, weight: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise AssertionError(f"{hook} returned {type(values).__name__}, not a tensor")
    shape, wanted = tuple(values.shape), tuple(weight.shape)
    expect(values.is_floating_point(), f"the new values are {values.dtype}, not floating")
    expect(shape == wanted, f"the new values have shape {shape}, the weight {wanted}")
    expect(values.device == weight.device, f"the new values are on {values.device}")
    expect(bool(values.isfinite().all()), "new values are NaN or infinite")


def _expect_block(answer: object, case: BlockCase) -> None:
    if not isinstance(answer, Mapping):
        raise AssertionError(f"{BLOCK} returned {type(answer).__name__}, not a mapping")
    strange = next((name for name in answer if name not in case.masks), None)
    expect(strange is None, f"{BLOCK} returned values of '{strange}', which is not pruned")
    for name, values in answer.items():
        with situation(f"linear '{name}'"):
            _expect_values(BLOCK, values, case.dense[name])

"""What holds for every strategy of row ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neuroal.layout import Layout, Linear
from neuroal.plugins import Plugin
from neuroal.pruning.allocation import importance_problem
from neuroal.testing import cases
from neuroal.testing.checks import expect, situation
from neuroal.testing.ratios import SPARSITIES, RatiosConformance, measured_blocks
from neuroal.testing.search import SearchQuestion
from neuroal.types import Importance, Proposal, RowRatiosTraits


class RowRatiosConformance(RatiosConformance):
    """The checks of row ratios; a subclass has the fixture `plugin`, which returns an instance."""

    role = "row_ratios"

    def test_importance(self, plugin: Any) -> None:
        """Importance is positive, within bounds, one number per row, of linears that there are.

        That of inputs is one number per input, and only where the pruner can be weighed by it. A
        plugin that weighs rows leaves the ratios of linears alone.
        """
        weighs = self.load(plugin).traits(RowRatiosTraits).weighs_rows
        for s, trace in self._searches(plugin):
            for proposal in trace.proposals():
                with situation(s.name):
                    _expect_weighed(proposal, s, weighs)

    def test_deviation_on_other_devices(self, plugin: Any) -> None:
        """A search works on deviations that are on a device."""
        self._search_on_devices(self.load(plugin))

    def situations(self, p: Plugin, device: str = "cpu") -> Iterator[SearchQuestion]:
        """Yield every sparsity, every layout, and deviations and blocks that are equal or dead."""
        for i, (name, layout) in enumerate(cases.layouts()):
            for wanted in SPARSITIES if i == 0 else (0.5,):
                base = {
                    n: min(wanted * (0.9 + 0.2 * (x.block % 2)), 0.99)
                    for n, x in layout.linears.items()
                }
                mean = sum(base[n] * x.weights for n, x in layout.linears.items()) / layout.weights
                for told, arguments in _arguments(p, layout, device, every=wanted == 0.5):
                    yield SearchQuestion(
                        f"{name}, mean ratio {mean:g}{told}",
                        layout,
                        mean,
                        {"layout": layout, "base": base} | arguments,
                        i == 0 and 0.2 < mean < 0.8,
                    )


def _arguments(
    p: Plugin, layout: Layout, device: str, every: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield deviations, measurements and whether inputs are weighed, with what is special."""
    reads = "input_norm" in p.statistic_names()
    weighs = p.traits(RowRatiosTraits).weighs_rows
    for kind in ("scattered", "equal", "zero") if reads else ("scattered",):
        deviation = {
            n: _deviation(kind, x, seed).to(device)
            for seed, (n, x) in enumerate(layout.linears.items())
        }
        told = f", {kind} deviations" if kind != "scattered" else ""
        all_of_them = every and kind == "scattered"
        for blocks, measurements in measured_blocks(p, layout, device, every=all_of_them):
            for inputs in (True, False) if weighs and all_of_them else (True,):
                yield (
                    f"{told}{blocks}" + ("" if inputs else ", inputs cannot be weighed"),
                    {
                        "deviation": deviation if reads else {},
                        "measurements": measurements,
                        "weighs_inputs": inputs,
                    },
                )


def _deviation(kind: str, linear: Linear, seed: int) -> Tensor:
    """Return made-up deviations of a linear's input norms, `(in,)`."""
    if kind == "scattered":
        return cases.random(linear.in_features, seed=seed)
    return torch.full((linear.in_features,), 0.25 if kind == "equal" else 0.0)


def _expect_weighed(proposal: Proposal, s: SearchQuestion, weighs: bool) -> None:
    """Expect importance that its plugin may propose."""
    numbers = {n: r for n, r in proposal.ratios.items() if not isinstance(r, Tensor)}
    same = not weighs or numbers == s.arguments["base"]
    expect(same, "proposes other ratios than it was given")
    kind = type(proposal.importance).__name__
    mapping = isinstance(proposal.importance, Mapping)
    expect(mapping, f"importance is {kind}, not a mapping")
    allowed = weighs or not proposal.importance
    expect(allowed, "importance, though describe does not say weighs_rows=True")
    for name, importance in proposal.importance.items():
        with situation(f"linear '{name}'"):
            expect(name in s.layout.linears, "importance of what is not a linear")
            kind = type(importance).__name__
            expect(isinstance(importance, Importance), f"{kind} in place of Importance")
            linear = s.layout.linears[name]
            _expect_importance(importance.rows, linear.out_features)
        if importance.inputs is not None:
            with situation(f"inputs of linear '{name}'"):
                asked = s.arguments["weighs_inputs"]
                expect(asked, "importance of inputs, though weighs_inputs is False")
                _expect_importance(importance.inputs, linear.in_features)


def _expect_importance(values: object, size: int) -> None:
    expect(isinstance(values, Tensor), f"importance is {type(values).__name__}, not a tensor")
    assert isinstance(values, Tensor)
    shape = tuple(values.shape)
    expect(shape == (size,), f"importance has shape {shape}, not ({size},)")
    expect(values.is_floating_point(), f"importance is {values.dtype}, not floating")
    problem = importance_problem(values.double())
    expect(problem is None, f"importance {problem}")

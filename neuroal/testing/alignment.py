"""What holds for every alignment metric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuroal.plugins import Plugin
from neuroal.testing import cases, models
from neuroal.testing.checks import (
    Conformance,
    content,
    devices,
    expect,
    expect_repeatable,
    expect_unchanged,
    situation,
)


class AlignmentConformance(Conformance):
    """The checks of a metric; a subclass has the fixture `plugin`, which returns an instance.

    Attributes:
        tolerance: What rounding may leave of the misalignment of a thing with itself.
    """

    role = "alignment"
    tolerance: float = 1e-6

    def test_is_a_number(self, plugin: Any) -> None:
        """Its answer is one finite number: a floating tensor without dimensions."""
        p = self.load(plugin)
        for name, arguments in _situations(p):
            with situation(name):
                value = _ask(p, arguments)
                expect(isinstance(value, Tensor), f"returned {type(value).__name__}, not a tensor")
                expect(value.dim() == 0, f"returned shape {tuple(value.shape)}, not a 0-d tensor")
                expect(value.is_floating_point(), f"returned {value.dtype}, not floating")
                expect(bool(value.isfinite()), "returned NaN or infinity")

    def test_is_never_negative(self, plugin: Any) -> None:
        """Its answer is 0 or more, rounding included."""
        p = self.load(plugin)
        for name, arguments in (*_situations(p), *_same(p)):
            with situation(name):
                value = float(_ask(p, arguments))
                expect(not value < 0, f"returned {value:g}, which is below 0")

    def test_same_is_zero(self, plugin: Any) -> None:
        """The misalignment of a thing with itself is 0."""
        p = self.load(plugin)
        for name, arguments in _same(p):
            with situation(name):
                value = float(_ask(p, arguments))
                expect(not abs(value) > self.tolerance, f"returned {value:g} for what is the same")

    def test_tells_apart(self, plugin: Any) -> None:
        """Something that differs is further away than the same."""
        p = self.load(plugin)
        values = [float(_ask(p, arguments)) for _, arguments in _situations(p)]
        expect(any(v > self.tolerance for v in values), "finds no difference between any two runs")

    def test_averages_windows(self, plugin: Any) -> None:
        """Of several windows' logits the answer is the mean over the windows."""
        p = self.load(plugin, "measure_output")
        for name, arguments in _situations(p):
            every = zip(arguments["dense_logits"], arguments["pruned_logits"], strict=True)
            parts = [
                float(_ask(p, {"dense_logits": a[None], "pruned_logits": b[None]}))
                for a, b in every
            ]
            mean, whole = sum(parts) / len(parts), float(_ask(p, arguments))
            close = not abs(whole - mean) > 1e-3 * abs(mean) + self.tolerance
            expect(close, f"returned {whole:g}, and {mean:g} on average over windows ({name})")

    def test_repeats(self, plugin: Any) -> None:
        """The same inputs have the same answer, whatever was measured between."""
        p = self.load(plugin)
        expect_repeatable(lambda: _ask(p, next(_situations(p))[1]), _hook(p))
        first = list(content(_ask(p, next(_situations(p))[1])))
        for _, arguments in _situations(p):
            _ask(p, arguments)
        again = list(content(_ask(p, next(_situations(p))[1])))
        expect(again == first, f"{_hook(p)} depends on what was measured before")

    def test_leaves_inputs_alone(self, plugin: Any) -> None:
        """Statistics and logits are not written to."""
        p = self.load(plugin)
        for name, arguments in _situations(p):
            with situation(name):
                expect_unchanged(arguments, partial(_ask, p, arguments), _hook(p))

    def test_other_devices(self, plugin: Any) -> None:
        """On a device its answer stays there, and is that of the CPU to a part in a thousand."""
        p = self.load(plugin)
        for device in devices():
            here = dict(_situations(p))
            for name, arguments in _situations(p, device):
                with situation(f"{name}, {device}"):
                    value, known = _ask(p, arguments), float(_ask(p, here[name]))
                    expect(value.device.type == device, "takes its answer to another device")
                    close = abs(float(value) - known) <= 1e-3 * abs(known) + self.tolerance
                    expect(close, "the answer is not that on the CPU")


def _hook(p: Plugin) -> str:
    return "measure_output" if p.has("measure_output") else "measure_linear"


def _ask(p: Plugin, arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return p.call(_hook(p), **arguments)


def _situations(p: Plugin, device: str = "cpu") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield arguments of two runs that differ."""
    for name, dense, pruned in _pairs(p):
        yield name, _arguments(p, dense.to(device), pruned.to(device))


def _same(p: Plugin) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield arguments of two runs that are the same."""
    for name, dense, _ in _pairs(p):
        yield f"the same twice: {name}", _arguments(p, dense, dense.clone())


def _pairs(p: Plugin) -> Iterator[tuple[str, Tensor, Tensor]]:
    return cases.logits() if p.has("measure_output") else cases.pairs()


def _arguments(p: Plugin, dense: Tensor, pruned: Tensor) -> dict[str, Any]:
    if p.has("measure_output"):
        return {"dense_logits": dense, "pruned_logits": pruned}
    required = p.required_statistics()
    return {
        "dense": models.collect(dense, *required, dense=dense),
        "pruned": models.collect(pruned, *required, dense=dense),
        "linear": models.linear(4, dense.shape[-1]),
    }

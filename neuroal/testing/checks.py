"""What holds for a plugin of any role, and what the checks of every role are made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor

from neuroal import options
from neuroal.errors import NeuroalError
from neuroal.plugins import Plugin, load
from neuroal.testing import simulated_device
from neuroal.walk.statistics import Statistics, resolve


class Conformance:
    """Checks that hold for every role; subclass the class of your plugin's role instead.

    A subclass has one fixture, `plugin`, which returns an instance of the plugin. What does not
    concern the plugin is skipped. Every method raises `AssertionError` or `PluginError` with one
    line that says what was wrong in which situation.

    Attributes:
        role: The role.
        quick: Leave out what takes long; `neuroal plugins check` does.
    """

    role: ClassVar[str]
    quick: bool = False

    def load(self, plugin: Any, *hooks: str) -> Plugin:
        """Return the plugin as a run has it, checked; skip what needs one of some hooks."""
        loaded = plugin if isinstance(plugin, Plugin) else load([(self.role, plugin)])[0]
        if hooks and not any(loaded.has(hook) for hook in hooks):
            raise SkipTest(f"the plugin has no {' or '.join(hooks)}")
        return loaded

    def test_contract(self, plugin: Any) -> None:
        """It is a frozen dataclass with the hooks of its role, as `hookspecs` has them."""
        self.load(plugin)

    def test_options_round_trip(self, plugin: Any) -> None:
        """Its options can be written into a recipe, and typed on the command line."""
        p = self.load(plugin)
        values = options.values(p.instance)
        for how, given in (
            ("JSON", json.loads(json.dumps(values))),
            ("the command line", {k: _typed(v) for k, v in values.items() if v != []}),
        ):
            again = options.values(options.bind(type(p.instance), given, p.name))
            changed = [k for k in given if again[k] != values[k]]
            expect(not changed, f"options do not come back from {how}: {', '.join(changed)}")

    def test_required_statistics(self, plugin: Any) -> None:
        """It asks for statistics that there are, and for the same ones every time."""
        p = self.load(plugin)
        first = p.required_statistics()
        resolve(first)
        expect(p.required_statistics() == first, "required_statistics differs between two calls")


def expect(holds: bool, otherwise: str) -> None:
    """Raise an `AssertionError` that says what is wrong, also where asserts are switched off."""
    if not holds:
        raise AssertionError(otherwise)


def devices() -> list[str]:
    """Return the devices besides the CPU: CUDA's where there is one, and a simulated one.

    Skips a check where the installed torch cannot simulate one.
    """
    found = ["cuda"] if torch.cuda.is_available() else []
    if simulated_device.available():
        simulated_device.register()
        found.append(simulated_device.NAME)
    if not found:
        raise SkipTest("there is no device but the CPU")
    return found


def expect_repeatable(ask: Callable[[], Any], what: str) -> None:
    """Expect two equal answers, to the bit, whatever torch's global generator has drawn."""
    answers = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            answers.append(list(content(ask())))
    expect(answers[0] == answers[1], f"{what} differs between two calls: draw from `rng` alone")


def expect_unchanged(given: Any, ask: Callable[[], Any], what: str) -> None:
    """Expect that a call leaves every byte of its arguments alone."""
    before = list(content(given))
    ask()
    expect(list(content(given)) == before, f"{what} changes its inputs: work on a copy (clone())")


def content(value: Any) -> Iterator[Any]:
    """Yield everything in arguments or an answer as what compares by value, tensors as bytes."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Statistics):
        yield from content(value.tensors())
    elif isinstance(value, torch.Generator):
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from content(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield len(value)
        for item in value:
            yield from content(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from content(getattr(value, f.name))
    else:
        yield repr(value)  # by which NaN is NaN


@contextmanager
def situation(name: str) -> Iterator[None]:
    """Make an error say in which situation it was raised."""
    try:
        yield
    except (AssertionError, NeuroalError) as error:
        raise AssertionError(f"{' '.join(str(error).split())} ({name})") from error


def _typed(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, list) else str(value)

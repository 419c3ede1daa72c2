"""Timing that is over in seconds: what is run, and what is extrapolated, by a clock of our own."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from neuroal import Recipe
from neuroal.cost import probes
from neuroal.cost.preparation import prepare
from neuroal.cost.probes import corner, corner_statistics, grow, least, scale
from neuroal.cost.timings import time_block, time_forward
from neuroal.layout import Layout
from neuroal.testing import layout
from neuroal.walk.statistics import Statistics


class Clock:
    """Stands for `time`: only work makes it go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(probes, "time", made)
    return made


def work(
    clock: Clock, sizes: list[float], **cost: Callable[[float], float]
) -> tuple[list[int], Callable[[int], Mapping[str, float]]]:
    """Work that takes so long by its size, and the steps that were done."""
    done: list[int] = []

    def run(k: int) -> Mapping[str, float]:
        done.append(k)
        seconds = {kind: of(sizes[k]) for kind, of in cost.items()}
        clock.now += sum(seconds.values())
        return seconds

    return done, run


def test_what_fits_is_timed_whole(clock: Clock) -> None:
    sizes = [1.0, 2.0, 3.0]
    done, run = work(clock, sizes, a=lambda n: 0.1 * n)
    timed = grow(sizes, run, 1.0, 2.0, seconds=2.0)
    assert done == [0, 1, 2] and timed.seconds == {"a": pytest.approx(0.3)}
    assert not timed.extrapolated


def test_what_does_not_fit_is_extrapolated_by_its_own_power(clock: Clock) -> None:
    """0.1 n² and 0.05 n in 1.5 s: sizes 1 and 2 take 0.15 + 0.5; size 4 might take 2 s more."""
    sizes = [1.0, 2.0, 4.0, 8.0]
    done, run = work(clock, sizes, square=lambda n: 0.1 * n * n, line=lambda n: 0.05 * n)
    timed = grow(sizes, run, 1.0, 2.0, seconds=1.5)
    assert done == [0, 1] and timed.extrapolated
    assert timed.seconds == {"square": pytest.approx(6.4), "line": pytest.approx(0.4)}


def test_a_start_of_its_own_is_not_taken_for_little_growth(clock: Clock) -> None:
    """The least power that is believed is 2; and a step that grows more is cut at 3."""
    sizes = [1.0, 2.0, 4.0]
    cost = {"flat": lambda n: 1.0, "steep": lambda n: 0.01 * n**5}
    _, run = work(clock, sizes, **cost)
    timed = grow(sizes, run, 2.0, 3.0, seconds=10.0)
    assert timed.seconds == {"flat": pytest.approx(4.0), "steep": pytest.approx(0.32 * 8)}


def test_the_first_step_alone(clock: Clock) -> None:
    done, run = work(clock, [2.0, 6.0], a=lambda n: 100.0)
    timed = grow([2.0, 6.0], run, 1.0, 2.0, seconds=1.0)
    assert done == [0] and timed.seconds == {"a": 300.0} and timed.extrapolated


def test_what_is_quick_is_timed_again() -> None:
    answers = iter([{"a": 0.02, "b": 0.01}, {"a": 0.01, "b": 0.02}, {"a": 0.03, "b": 0.03}])
    assert least(lambda: next(answers)) == {"a": 0.01, "b": 0.01}
    answers = iter([{"a": 0.06}])
    assert least(lambda: next(answers)) == {"a": 0.06}


def test_corners_by_hand() -> None:
    found = layout(1, {"a": (10, 6), "b": (4, 10)})
    made = corner(found.blocks[0], 5, 4)  # inputs are a multiple of 4
    assert [(x.out_features, x.in_features) for x in made.linears] == [(5, 4), (4, 4)]
    assert scale(made) == pytest.approx(((20 + 16) / 2) ** 0.5)
    norm, gram = torch.arange(6.0), torch.arange(36.0).view(6, 6)
    both = Statistics({"input_norm": norm, "gram": gram}, 3, 30)
    cut = corner_statistics(made, {"blocks.0.a": both}, found)["blocks.0.a"]
    assert cut.input_norm.tolist() == [0, 1, 2, 3]
    assert cut.gram.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [12, 13, 14, 15], [18, 19, 20, 21]]
    assert (cut.windows, cut.tokens) == (3, 30)
    assert corner(Layout(found.blocks).blocks[0], 64, 1).linears[0].out_features == 10


METHODS = [
    {},
    {"pruner": "sparsegpt"},
    {"pattern": "2:4"},
    {"reconstruction": "refit"},
    {"reconstruction": "block"},
]


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_takes_too_long_is_timed_by_a_part(
    method: dict[str, Any],
    models: Mapping[str, Path],
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no time at all, the first step of each kind: the smallest, and its time grown."""
    asked = dataclasses.replace(recipe, model=str(models["llama"]), options={}, **method)
    prepared = prepare(asked)
    monkeypatch.setattr(probes, "SECONDS", 1e9)
    whole = time_block(prepared, 16)
    assert not whole.extrapolated
    monkeypatch.setattr(probes, "SECONDS", 0.0)
    monkeypatch.setattr("neuroal.cost.timings._TOKENS", 4)
    monkeypatch.setattr("neuroal.cost.timings._CORNER", 8)
    part = time_block(prepared, 16)
    assert part.extrapolated and part.seconds.keys() == whole.seconds.keys()
    assert all(x > 0 for x in part.seconds.values())
    forward = time_forward(str(models["llama"]), "cpu", "auto", 16)
    assert forward.extrapolated and set(forward.seconds) == {"block", "head"}

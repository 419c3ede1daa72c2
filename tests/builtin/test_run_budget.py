"""The budget of searches by hand: 4 blocks, 8 windows, candidates of 2 runs a block and window."""

import math

import pytest

from neuroal import Measurement
from neuroal_plugins.run_budget import RunBudget

BLOCKS, WINDOWS, CANDIDATE = 4, 8, 64


def measured(*block_runs: int) -> list[Measurement]:
    return [Measurement(1.0, False, runs) for runs in block_runs]


def budget(left: float) -> RunBudget:
    return RunBudget(left, BLOCKS, WINDOWS, CANDIDATE)


def test_a_reference_is_paid_once_for_every_number_of_windows() -> None:
    b = budget(1000)
    b.pay(measured(16, 8), windows=2)
    assert b.left == 1000 - 24 - 4 * 2
    b.pay(measured(10), windows=2)
    assert b.left == 1000 - 24 - 4 * 2 - 10
    b.pay(measured(64))  # all windows: its reference is paid from the beginning
    assert b.left == 1000 - 24 - 4 * 2 - 10 - 64


def test_a_reserve_of_one_window_is_set_aside() -> None:
    # A candidate (64), its reference (4 · 8), and both on one window (8 and 4).
    b = RunBudget.with_reserve(1000, BLOCKS, WINDOWS, CANDIDATE)
    assert b.left == 1000 - 64 - 32 - 8 - 4
    b.pay(measured(8), windows=1)
    b.pay(measured(64), windows=8)
    assert b.left == 1000 - 64 - 32 - 8 - 4 - 8 - 64
    one = RunBudget.with_reserve(1000, BLOCKS, 1, 8)
    assert one.left == 1000 - 8 - 8 - 4  # the reference of all windows is that of one


def test_candidates_that_can_be_paid() -> None:
    b = budget(200)
    assert b.affordable(None) == 3
    assert b.affordable(2) == (200 - 8) // 64  # no price is known there
    b.pay(measured(12, 16), windows=2)
    assert b.affordable(2) == (200 - 8 - 28) // 16
    assert budget(math.inf).affordable(2) is None
    assert budget(-5).affordable(None) == 0


def test_probes_share_what_is_before_their_change() -> None:
    # The first pass over all blocks at 2 runs each, then 2 for each block from the change on.
    assert budget(0).probes([0, 3], windows=3) == (2 * 4 + 2 * (4 + 1)) * 3
    b = budget(1000)
    assert b.probes([0, 3], 3, reuse=True) == b.probes([0, 3], 3)
    b.pay(measured(24, 4 * 3, 1 * 3), windows=3, changed=[0, 3])  # 1 run a block after a change
    assert b.probes([0, 3], 3, reuse=True) == (2 * 4 + 1 * (4 + 1)) * 3
    assert b.probes([0, 3], 3) == (2 * 4 + 2 * (4 + 1)) * 3


@pytest.mark.parametrize(("left", "fits"), [(164, True), (163, False)])
def test_what_fits(left: int, fits: bool) -> None:
    assert budget(left).fits(probes=100, candidates=1) is fits

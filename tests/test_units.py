"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from neuroal import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.0 MiB"),
        (2**20, "1.0 MiB"),
        (36_700_160, "35.0 MiB"),
        (2**30 - 2**26, "960.0 MiB"),
        (2**30, "1.0 GiB"),
        (1.5 * 2**40, "1536.0 GiB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert units.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (1, "1.0 s"),
        (99.94, "99.9 s"),
        (100, "1 min 40 s"),
        (185, "3 min 05 s"),
        (3569, "59 min 29 s"),
        (3599.9, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_rough_duration() -> None:
    """A unit is used from one and a half of it on."""
    seconds = (4, 89, 90, 5399, 5400, 7200, 129_599, 129_600, 200_000)
    assert [units.rough_duration(x) for x in seconds] == [
        *("4 s", "89 s", "2 min", "90 min", "1.5 h", "2.0 h", "36.0 h", "1.5 days", "2.3 days")
    ]
    assert units.rough_duration(4.26, digits=1) == "4.3 s"
    assert units.rough_duration(120, digits=1) == "2 min"


def test_number() -> None:
    values = (0.000574979123, 24.31, 1234567.0, math.inf)
    assert [units.number(x) for x in values] == ["0.000574979", "24.31", "1.23457e+06", "inf"]
    assert units.number(3.14159, digits=3) == "3.14"


def test_percent() -> None:
    assert (units.percent(0.7), units.percent(0.65432, 2)) == ("70.0%", "65.43%")


def test_parameters() -> None:
    """Numbers to six digits, everything else as it is."""
    values = {"lam": 0.1 + 0.2, "alpha": 5, "kind": "output"}
    assert units.parameters(values) == "λ = 0.3, alpha = 5, kind = output"
    assert units.parameters({}) == ""

"""What a figure is made of, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]
Cell = str | int | float | bool | None


HALF = 420  # pixels: what half the page has room for


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure, in full.

    Attributes:
        headers: One a column.
        rows: Cells; numbers are shown to six digits.
        best: (row, column) of the cells to mark.
    """

    headers: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Figure:
    """One chart with its words; or, in place of the chart, why there is none.

    Attributes:
        title: What it shows.
        caption: What to see in it: also its text alternative.
        spec: A Vega-Lite view; None where `caption` says what is missing.
        table: The same numbers.
        wide: Takes the whole width of the page.
    """

    title: str
    caption: str
    spec: Spec | None = None
    table: Table | None = None
    wide: bool = False


def fitted(width: int, height: int) -> Spec:
    """Return the size of a view, axes and legends included."""
    return {
        "width": width,
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
    }


def number(value: float, digits: int = 6) -> str:
    """Return a number to some significant digits: `0.000574979`, `24.31`, `inf`."""
    return f"{value:.{digits}g}"


def percent(value: float, digits: int = 1) -> str:
    """Return a share as per cent: `70.0%`."""
    return f"{value:.{digits}%}"


def seconds(value: float) -> str:
    """Return a time: `0.01 s`, `24.6 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 100:
        return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"
    minutes = round(value / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    whole = round(value)
    return f"{whole // 60} min {whole % 60:02d} s"


def memory(count: float) -> str:
    """Return a number of bytes: `1.2 GiB`, `35.0 MiB`."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.1f} {name}"


def parameters(values: Mapping[str, Any]) -> str:
    """Return a candidate's parameters: `λ = 0.08`."""
    return ", ".join(
        f"{'λ' if key == 'lam' else key} = {number(x) if isinstance(x, float) else x}"
        for key, x in values.items()
    )


def finite(value: object) -> float | None:
    """Return a finite number, also of the text of one; None for anything else."""
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None

"""What a figure is made of: its words, its view, its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]
TableValue = str | int | float | bool | None

HALF = 420  # pixels: what half the page has room for


@dataclass(frozen=True)
class Table:
    """The numbers of a figure, in full.

    Attributes:
        headers: One a column.
        rows: Cells; numbers are shown to six digits.
        best: (row, column) of the cells to mark.
    """

    headers: tuple[str, ...]
    rows: Sequence[Sequence[TableValue]]
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


def finite(value: object) -> float | None:
    """Return a finite number, also of the text of one; None for anything else."""
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None

"""The parts of a section, which says what a run or a study was; page.py lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuroal.html_report.figure import Figure, Table


@dataclass(frozen=True)
class Fact:
    """One number that matters, with what it is and a few words more."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Details:
    """Something to look up: words, a command, names with values, a table; any of them."""

    title: str
    words: str = ""
    command: str = ""
    pairs: Sequence[tuple[str, str]] = ()
    table: Table | None = None


@dataclass(frozen=True)
class ShownScore:
    """One cell of a comparison: `shown`, and the number itself."""

    mean: float
    shown: str
    best: bool


@dataclass(frozen=True)
class MethodRow:
    """One row of a comparison; a score per column, None where there is none."""

    pruner: str
    top_up: str
    scores: Sequence[ShownScore | None]
    dense: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """A table of methods against sparsities."""

    title: str
    words: str
    columns: Sequence[str]
    rows: Sequence[MethodRow]


@dataclass(frozen=True)
class Section:
    """One section of a report, from its title to what may be looked up in it."""

    title: str
    lead: str
    facts: Sequence[Fact]
    notes: Sequence[str]
    figures: Sequence[Figure]
    listings: Sequence[Details]
    comparisons: Sequence[ScoreTable] = ()

"""What flowed where in a trace, said of linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal.layout.experts import Experts
from neuroal.layout.matrices import Place
from neuroal.layout.parts import Fed, Rows
from neuroal.layout.trace import Event, Trace


@dataclass(frozen=True)
class TracedLinear:
    """A linear before it knows its group and consumer.

    Attributes:
        name: Its name.
        place: Where its matrix lies.
        event: A product with it, or with the same matrix of another expert.
        experts: Whose matrix it is, if tokens are routed to it.
        expert: Which expert's.
    """

    name: str
    place: Place
    event: Event
    experts: Experts | None = None
    expert: int | None = None


class Flows:
    """Answers what a linear's rows are and feed."""

    def __init__(self, trace: Trace, names: dict[Event, dict[int | None, str]]) -> None:
        """Read a trace; `names` are those of linears by their product and expert."""
        self._trace, self._names = trace, names
        self._fed: dict[tuple[Event, Event], tuple[tuple[int, int, int], ...]] = {}
        self._rows: dict[Event, tuple[Rows, ...]] = {}

    @classmethod
    def of(cls, trace: Trace, linears: Sequence[Sequence[Sequence[TracedLinear]]]) -> Flows:
        """Return the flows between linears."""
        names: dict[Event, dict[int | None, str]] = {}
        for found in (x for block in linears for group in block for x in group):
            names.setdefault(found.event, {})[found.expert] = found.name
        return cls(trace, names)

    def rows(self, found: TracedLinear) -> tuple[Rows, ...]:
        """Return what a linear's rows are."""
        if found.event not in self._rows:
            roles = self._trace.roles.get(found.event, {})
            made = [Rows(name, _ranges(x)) for name, x in roles.items()]
            self._rows[found.event] = tuple(sorted(made, key=_first))
        return self._rows[found.event]

    def fed(self, found: TracedLinear) -> Fed | None:
        """Return what a linear's rows feed."""
        for reader, columns in self._trace.reads.get(found.event, {}).items():
            readers = self._names.get(reader)
            if readers:
                name = readers.get(found.expert) or next(iter(readers.values()))
                key = (found.event, reader)
                if key not in self._fed:
                    self._fed[key] = tuple(run for c in columns for run in _behind(c))
                return Fed(name, self._fed[key])
        return None


def _first(rows: Rows) -> int:
    return rows.ranges[0][0]


def _ranges(rows: Tensor) -> tuple[tuple[int, int], ...]:
    return tuple((start, start + length) for start, _, length in _runs(rows, rows))


def _behind(columns: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Return runs of the row behind each column; -1 is none."""
    there = (columns >= 0).nonzero().flatten()
    return _runs(columns[there].long(), there)


def _runs(rows: Tensor, columns: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Return `(row, column, length)` of stretches in which both go up by one."""
    if not len(rows):
        return ()
    jumps = (rows.diff() != 1) | (columns.diff() != 1)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), jumps.nonzero().flatten() + 1])
    lengths = torch.cat([starts, torch.tensor([len(rows)])]).diff()
    made = zip(rows[starts].tolist(), columns[starts].tolist(), lengths.tolist(), strict=True)
    return tuple(made)

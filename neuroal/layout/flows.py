"""What rows of a linear are and which columns they become, by linear names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuroal.layout.experts import TracedLinear
from neuroal.layout.parts import Fed, Rows
from neuroal.layout.trace import Event, Trace


class Flows:
    """What the rows of every linear are, and what they feed."""

    def __init__(self, trace: Trace, linears: Sequence[Sequence[Sequence[TracedLinear]]]) -> None:
        """Read a trace; the linears are by block and group."""
        self._trace = trace
        self._names: dict[Event, dict[int | None, str]] = {}  # by expert
        for linear in (x for block in linears for group in block for x in group):
            self._names.setdefault(linear.event, {})[linear.expert] = linear.name
        self._fed: dict[tuple[Event, Event], tuple[tuple[int, int, int], ...]] = {}
        self._rows: dict[Event, tuple[Rows, ...]] = {}

    def rows(self, linear: TracedLinear) -> tuple[Rows, ...]:
        """Return what a linear's rows are."""
        if linear.event not in self._rows:
            roles = self._trace.roles.get(linear.event, {})
            rows = [Rows(name, _ranges(x)) for name, x in roles.items()]
            self._rows[linear.event] = tuple(sorted(rows, key=lambda x: x.ranges[0][0]))
        return self._rows[linear.event]

    def fed(self, linear: TracedLinear) -> Fed | None:
        """Return what a linear's rows feed."""
        for reader, columns in self._trace.reads.get(linear.event, {}).items():
            readers = self._names.get(reader)
            if readers:
                name = readers.get(linear.expert) or next(iter(readers.values()))
                key = (linear.event, reader)
                if key not in self._fed:
                    self._fed[key] = tuple(run for c in columns for run in _rows_of(c))
                return Fed(name, self._fed[key])
        return None


def _ranges(rows: Tensor) -> tuple[tuple[int, int], ...]:
    return tuple((start, start + length) for start, _, length in _runs(rows, rows))


def _rows_of(columns: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Return runs of the row that each column came from; -1 is none."""
    read = (columns >= 0).nonzero().flatten()
    return _runs(columns[read].long(), read)


def _runs(rows: Tensor, columns: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Return `(row, column, length)` of runs in which both go up by one."""
    if not len(rows):
        return ()
    jumps = (rows.diff() != 1) | (columns.diff() != 1)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), jumps.nonzero().flatten() + 1])
    lengths = torch.cat([starts, torch.tensor([len(rows)])]).diff()
    return tuple(
        zip(rows[starts].tolist(), columns[starts].tolist(), lengths.tolist(), strict=True)
    )

"""Which queries, keys and values of an attention belong together, read off the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroal import Layout, Linear


@dataclass(frozen=True, eq=False)
class Heads:
    """The attention that a linear is part of.

    Attributes:
        output: Name of the linear that reads the values: the output projection.
        shared: For every column of it, which value it reads, counted among the values: int64
            `(columns,)`. The query of the same place and the key at the value's place belong to it.
        values: Number of values.
    """

    output: str
    shared: Tensor
    values: int

    @classmethod
    def of(cls, layout: Layout, linear: Linear) -> Heads | None:
        """Return the attention that a linear is part of; None where the layout shows none.

        The linears of one group read the same input: q, k and v, or one that fuses them.
        """
        group = [x for x in layout.blocks[linear.block].linears if x.group == linear.group]
        with_values = [x for x in group if x.fed is not None and any(r.name == "v" for r in x.rows)]
        if len(with_values) != 1 or with_values[0].fed is None:
            return None
        fed = with_values[0].fed
        values = [i for rows in with_values[0].rows if rows.name == "v" for i in rows.indices()]
        place = torch.full((with_values[0].out_features,), -1)
        place[values] = torch.arange(len(values))
        shared = torch.full((layout.linears[fed.linear].in_features,), -1)
        for row, column, length in fed.runs:
            shared[column : column + length] = place[row : row + length]
        return cls(fed.linear, shared, len(values)) if bool((shared >= 0).all()) else None

    def summed(self, columns: Tensor) -> Tensor:
        """Return, per value, the sum over the columns `(columns,)` that read it."""
        return columns.new_zeros(self.values).index_add_(0, self.shared, columns)

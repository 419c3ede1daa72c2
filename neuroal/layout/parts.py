"""What a model is made of: linears in blocks, and what stays dense."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in a parameter.

    Attributes:
        parameter: The parameter's full name.
        offset: Elements from the parameter's first to the matrix's.
        strides: Elements from one row to the next, and from one column to the next.
    """

    parameter: str
    offset: int
    strides: tuple[int, int]

    @classmethod
    def whole(cls, parameter: str, columns: int) -> Place:
        """Return the place of a matrix that is all of a parameter."""
        return cls(parameter, 0, (columns, 1))

    @property
    def transposed(self) -> bool:
        """Return whether the parameter holds the matrix as `(in, out)`."""
        return self.strides[1] > self.strides[0]


NOWHERE = Place("", 0, (0, 0))
"""The place of a linear that is described without a model."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a linear.

    Attributes:
        name: What they are: "q", "k" or "v" of attention, "gate" or "up" of a gated MLP.
        ranges: `(first, last + 1)`, in order.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]

    def indices(self) -> list[int]:
        """Return the rows in order."""
        return [row for start, stop in self.ranges for row in range(start, stop)]


@dataclass(frozen=True)
class Fed:
    """What a linear's rows feed, as the tensors flow.

    Attributes:
        linear: Name of the first linear that reads them as its columns.
        runs: `(row, column, length)`: that many rows, from `row` on, are its columns from `column`
            on.
    """

    linear: str
    runs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: Full dotted module name; for a slice of a stacked parameter, the parameter's name
            and the slice's index.
        block: Index of its block.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        group: Index, within the block, of the input that it shares with other linears (q, k and v;
            gate and up); groups count in execution order.
        paired: The linear whose input the paper reads this one's rows from: the first of the next
            group in execution order; None at the end of the model, and where row counts differ
            from the consumer's input (grouped key/value heads: the whole group).
        part: "attention" for the child modules of the block that hold the first linear to run or
            queries, keys and values, "mlp" for the rest.
        place: Where its matrix lies in the model's parameters.
        expert: Index among the matrices that tokens are routed to; None where every token passes.
        rows: What its rows are, where the trace shows it: several where it is fused.
        fed: What its rows feed, as the tensors flow; None where they become no columns (queries and
            keys, in attention), or where the trace does not show it.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    group: int
    paired: str | None
    part: Literal["attention", "mlp"] = "mlp"
    place: Place = NOWHERE
    expert: int | None = None
    # Not compared: they may depend on the experts that the traced tokens were routed to.
    rows: tuple[Rows, ...] = field(default=(), compare=False)
    fed: Fed | None = field(default=None, compare=False)

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class SkippedWeight:
    """A parameter of two or more dimensions in a block that stays dense, and why."""

    name: str
    block: int
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Block:
    """One decoder block: its module name and its linears in execution order."""

    index: int
    name: str
    linears: tuple[Linear, ...]

    @property
    def weights(self) -> int:
        """Return the number of prunable weights."""
        return sum(linear.weights for linear in self.linears)


@dataclass(frozen=True, repr=False)
class Layout:
    """The blocks of a model in execution order, and the weights in them that stay dense."""

    blocks: tuple[Block, ...]
    skipped: tuple[SkippedWeight, ...] = ()

    def __repr__(self) -> str:
        """Return how many blocks, linears and prunable weights there are."""
        counts = f"{len(self.blocks)} blocks, {len(self.linears)} linears, {self.weights:,} weights"
        return f"Layout({counts})"

    def records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each linear, as `pandas.DataFrame` takes them."""
        return [
            {
                "linear": x.name,
                "block": x.block,
                "rows": x.out_features,
                "columns": x.in_features,
                "weights": x.weights,
                "group": x.group,
                "part": x.part,
                "consumer": x.paired,
                "feeds": None if x.fed is None else x.fed.linear,
                "expert": x.expert,
            }
            for x in self.linears.values()
        ]

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Return every linear by name, in execution order."""
        return {linear.name: linear for block in self.blocks for linear in block.linears}

    @property
    def weights(self) -> int:
        """Return the number of prunable weights."""
        return sum(block.weights for block in self.blocks)

    def without(self, names: Container[str]) -> Layout:
        """Return the layout that is left without some linears; blocks are counted anew.

        A block without linears is left out, and so is a consumer that is not there any more.
        """
        blocks: list[Block] = []
        for block in self.blocks:
            left = [x for x in block.linears if x.name not in names]
            own = tuple(replace(_without(x, names), block=len(blocks)) for x in left)
            if own:
                blocks.append(Block(len(blocks), block.name, own))
        return Layout(tuple(blocks), self.skipped)

    def dense(self) -> list[str]:
        """Return a line for every reason why weights in blocks stay dense."""
        reasons: dict[str, list[SkippedWeight]] = {}
        for x in self.skipped:
            reasons.setdefault(x.reason, []).append(x)
        return [
            f"{reason}: {same[0].name}" + (f" and {len(same) - 1} more" if len(same) > 1 else "")
            for reason, same in reasons.items()
        ]

    def per_block(self, ratios: Mapping[int, float] | list[float]) -> dict[str, float]:
        """Return a ratio per linear from a ratio per block."""
        return {name: float(ratios[linear.block]) for name, linear in self.linears.items()}


def _without(linear: Linear, names: Container[str]) -> Linear:
    """Return a linear whose consumers are not among `names`."""
    paired = None if linear.paired in names else linear.paired
    fed = None if linear.fed is not None and linear.fed.linear in names else linear.fed
    return replace(linear, paired=paired, fed=fed)

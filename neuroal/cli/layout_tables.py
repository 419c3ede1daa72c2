"""A model's blocks, linears and consumers as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from neuroal.cli.tables import table

if TYPE_CHECKING:
    from neuroal.layout import Block, Layout, Linear


def layout_json(layout: Layout, kept: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return blocks, linears and consumers as JSON values; `kept` are asked to stay dense."""
    return {
        "blocks": [
            {
                "index": block.index,
                "name": block.name,
                "weights": block.weights,
                "linears": [_linear_json(x) | {"kept": x.name in kept} for x in block.linears],
            }
            for block in layout.blocks
        ],
        "linears": len(layout.linears),
        "weights": layout.weights,
        "dense": [{"name": x.name, "shape": x.shape, "reason": x.reason} for x in layout.skipped],
    }


def _linear_json(x: Linear) -> dict[str, Any]:
    return {
        "name": x.name,
        "out_features": x.out_features,
        "in_features": x.in_features,
        "weights": x.weights,
        "group": x.group,
        "part": x.part,
        "paired": x.paired,
        "fed": None if x.fed is None else {"linear": x.fed.linear, "runs": x.fed.runs},
        "rows": {rows.name: rows.ranges for rows in x.rows},
        "parameter": x.place.parameter,
        "transposed": x.place.transposed,
        "expert": x.expert,
    }


def layout_tables(
    layout: Layout, every: bool = False, kept: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yield a titled table per run of equal blocks, or per block, and what stays dense.

    With `every`, neither equal blocks nor the experts of a block are put together. A column says
    which linears are `kept`, if any.
    """
    runs = [[b] for b in layout.blocks] if every else list(_runs(layout, kept))
    for run in runs:
        first, last = run[0], run[-1]
        title = f"block {first.index} ({first.name})"
        if len(run) > 1:
            title = f"blocks {first.index} to {last.index} ({first.name} to {last.name}), each"
        experts = 0 if every else 1 + max((x.expert or 0 for x in first.linears), default=0)
        shown = [x for x in first.linears if every or not x.expert]
        rows = [_row(x, first, layout, experts) for x in shown]
        headers = ["linear", "rows × columns", "weights", "group", "part", "consumer", "feeds"]
        if kept:
            headers.append("kept dense")
            rows = [
                (*row, _kept(x, first, layout, experts, kept))
                for row, x in zip(rows, shown, strict=True)
            ]
        yield f"{title}: {first.weights:,} weights\n{table(rows, headers, right=(1, 2, 3))}"
        consumed = [[x.paired is not None for x in block.linears] for block in (first, last)]
        if last is layout.blocks[-1] and consumed[0] != consumed[1]:
            end = _local(last.linears[-1], layout)
            yield f"(block {last.index} is the last: nothing consumes {end})"
    dense = layout.dense()
    if dense:
        yield "\n".join(["What stays dense:", *(f"- {line}" for line in dense)])


def _row(linear: Linear, block: Block, layout: Layout, experts: int) -> tuple[object, ...]:
    many = experts > 1 and linear.expert is not None
    place = "ᵀ" if linear.place.transposed else ""
    what = ", ".join(rows.name for rows in linear.rows)
    return (
        _all_experts(_local(linear, layout)) if many else _local(linear, layout),
        f"{linear.out_features} × {linear.in_features}{place}",
        f"{experts} × {linear.weights:,}" if many else f"{linear.weights:,}",
        linear.group,
        f"{linear.part}: {what}" if what else linear.part,
        _name(linear.paired, linear, layout, many) or "none",
        _feeds(linear, layout, many),
    )


def _kept(linear: Linear, block: Block, layout: Layout, experts: int, kept: frozenset[str]) -> str:
    """Say whether a linear is kept, or how many of the experts that stand in its line."""
    if experts < 2 or linear.expert is None:
        return "kept" if linear.name in kept else ""
    name = _all_experts(_local(linear, layout))
    same = [x for x in block.linears if _all_experts(_local(x, layout)) == name]
    count = sum(x.name in kept for x in same)
    return f"{count} of {len(same)}" if count else ""


def _all_experts(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _name(consumer: str | None, linear: Linear, layout: Layout, many: bool = False) -> str | None:
    """Return a consumer's name within its block; a star is the linear's own expert."""
    if consumer is None:
        return None
    other = layout.linears[consumer]
    name = _local(other, layout)
    if other.block != linear.block:
        return f"{name} (next block)"
    return _all_experts(name) if many and other.expert is not None else name


def _feeds(linear: Linear, layout: Layout, many: bool) -> str:
    """Say what a linear's rows feed, and which rows where not all do."""
    if linear.fed is None:
        return "none"
    name = _name(linear.fed.linear, linear, layout, many) or ""
    feeding = {row for start, _, length in linear.fed.runs for row in range(start, start + length)}
    if len(feeding) < linear.out_features:
        named = [x.name for x in linear.rows if set(x.indices()) == feeding]
        name += f" by {named[0]}" if named else f" by {len(feeding)} of its rows"
    columns = sum(length for _, _, length in linear.fed.runs)
    if feeding and columns > len(feeding):
        name += f", {columns // len(feeding)} columns each"
    return name


def _runs(layout: Layout, kept: frozenset[str]) -> Iterator[list[Block]]:
    run: list[Block] = []
    for block in layout.blocks:
        if run and not _alike(run[0], block, layout, kept):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _alike(one: Block, other: Block, layout: Layout, kept: frozenset[str]) -> bool:
    """Return whether two blocks have the same table; the model's end has no consumer."""
    if [x.name in kept for x in one.linears] != [x.name in kept for x in other.linears]:
        return False
    if [_shape(x, layout) for x in one.linears] != [_shape(x, layout) for x in other.linears]:
        return False
    last = other is layout.blocks[-1]
    for linear, similar in zip(one.linears, other.linears, strict=True):
        for consumer, its in zip(_consumers(linear), _consumers(similar), strict=True):
            leaves = consumer is not None and layout.linears[consumer].block != linear.block
            ends = last and leaves and its is None
            if not ends and _name(consumer, linear, layout) != _name(its, similar, layout):
                return False
    return True


def _consumers(linear: Linear) -> tuple[str | None, str | None]:
    return linear.paired, None if linear.fed is None else linear.fed.linear


def _shape(linear: Linear, layout: Layout) -> tuple[object, ...]:
    shape = (linear.out_features, linear.in_features, linear.place.transposed)
    return _local(linear, layout), shape, linear.expert, linear.group, linear.part, linear.rows


def _local(linear: Linear, layout: Layout) -> str:
    """Return the linear's name within its block."""
    return linear.name.removeprefix(f"{layout.blocks[linear.block].name}.")

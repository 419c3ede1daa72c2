"""Text tables, numbers as people read them, and the table of a model's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroal.layout import Block, Layout, Linear

Signature = tuple[tuple[Any, ...], ...]


def table(
    rows: Iterable[Sequence[object]],
    headers: Sequence[str] = (),
    right: Iterable[int] = (),
    style: str | None = None,
) -> str:
    """Return a table of text.

    Args:
        rows: Of one length.
        headers: Names of the columns; none for a table of names and values.
        right: Indices of the columns to align to the right.
        style: A table format of tabulate, in place of the terminal's.
    """
    import tabulate

    tabulate.MIN_PADDING = 0  # headers no wider than they are: tables fit 80 columns
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    align = ["right" if i in set(right) else "left" for i in range(len(cells[0]))]
    style = style or ("simple" if headers else "plain")
    return tabulate.tabulate(
        cells, headers=list(headers), tablefmt=style, colalign=align, disable_numparse=True
    )


def size(count: float) -> str:
    """Return a number of bytes: `1.2 GiB`, `35.0 MiB`."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.1f} {name}"


def parameters(values: Mapping[str, Any]) -> str:
    """Return a candidate's parameters: `λ = 0.08`."""
    return ", ".join(f"{'λ' if k == 'lam' else k} = {v}" for k, v in values.items())


def layout_json(found: Layout) -> dict[str, Any]:
    """Return blocks, linears and consumers as JSON values."""
    return {
        "blocks": [
            {
                "index": block.index,
                "name": block.name,
                "weights": block.weights,
                "linears": [
                    {
                        "name": x.name,
                        "out_features": x.out_features,
                        "in_features": x.in_features,
                        "weights": x.weights,
                        "group": x.group,
                        "part": x.part,
                        "paired": x.paired,
                    }
                    for x in block.linears
                ],
            }
            for block in found.blocks
        ],
        "linears": len(found.linears),
        "weights": found.weights,
    }


def layout_tables(found: Layout, every: bool = False) -> Iterator[str]:
    """Yield a titled table per run of equal blocks, or per block.

    Args:
        found: The layout.
        every: Do not put equal blocks together.
    """
    runs = [[b] for b in found.blocks] if every else list(_runs(found))
    for run in runs:
        first, last = run[0], run[-1]
        title = f"block {first.index} ({first.name})"
        if len(run) > 1:
            title = f"blocks {first.index} to {last.index} ({first.name} to {last.name}), each"
        rows = [_row(x, first, found) for x in first.linears]
        headers = ("linear", "rows × columns", "weights", "group", "part", "consumer")
        yield f"{title}: {first.weights:,} weights\n{table(rows, headers, right=(1, 2, 3))}"
        if len(run) > 1 and _ends(last, found) and _consumers(first) != _consumers(last):
            yield f"(block {last.index} is the last: nothing consumes {_local(last.linears[-1])})"


def _row(linear: Linear, block: Block, found: Layout) -> tuple[object, ...]:
    return (
        _local(linear),
        f"{linear.out_features} × {linear.in_features}",
        f"{linear.weights:,}",
        linear.group,
        linear.part,
        _consumer(linear, block, found) or "none",
    )


def _runs(found: Layout) -> Iterator[list[Block]]:
    run: list[Block] = []
    for block in found.blocks:
        if run and not _alike(run[0], block, found):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _alike(one: Block, other: Block, found: Layout) -> bool:
    """Return whether two blocks have the same table; the model's end has no consumer."""
    if [_shape(x) for x in one.linears] != [_shape(x) for x in other.linears]:
        return False
    consumers = zip(one.linears, other.linears, strict=True)
    return all(
        _consumer(a, one, found) == _consumer(b, other, found)
        or (b.paired is None and _ends(other, found) and b.group == other.linears[-1].group)
        for a, b in consumers
    )


def _shape(linear: Linear) -> tuple[object, ...]:
    return (_local(linear), linear.out_features, linear.in_features, linear.group, linear.part)


def _ends(block: Block, found: Layout) -> bool:
    return block is found.blocks[-1]


def _consumers(block: Block) -> list[bool]:
    return [x.paired is not None for x in block.linears]


def _local(linear: Linear) -> str:
    """Return the linear's name within its block: everything after the block's index."""
    return linear.name.split(f".{linear.block}.", 1)[-1]


def _consumer(linear: Linear, block: Block, found: Layout) -> str | None:
    if linear.paired is None:
        return None
    other = found.linears[linear.paired]
    return _local(other) if other.block == block.index else f"{_local(other)} (next block)"

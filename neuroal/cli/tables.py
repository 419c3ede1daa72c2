"""Text tables, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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

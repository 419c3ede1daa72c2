"""Text tables; the only module that imports `tabulate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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

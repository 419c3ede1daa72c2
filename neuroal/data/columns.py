"""Which columns of a table are read, and what a row of them is: text, token ids, a conversation."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuroal.data.conversations import CHAT_COLUMNS, OPTIONAL, Conversation
from neuroal.errors import NeuroalError, nearest

Columns = tuple[str, ...]
_PLAIN = ("input_ids", "text")


def choose(source: str, asked: str | None, names: Sequence[str]) -> Columns:
    """Return the columns to read: that which is asked for, else the first known ones.

    Args:
        source: What the user wrote.
        asked: The column that it names.
        names: The columns of the table.

    Raises:
        NeuroalError: There are none of these.
    """
    if asked is not None:
        if asked in names:
            return (asked,)
        raise NeuroalError(f"'{source}' has no column '{asked}': {nearest(asked, names)}")
    for columns in (*((name,) for name in _PLAIN), *CHAT_COLUMNS):
        if set(columns) <= set(names):
            return (*columns, OPTIONAL) if "instruction" in columns else columns
    chat = ", ".join(" and ".join(columns) for columns in CHAT_COLUMNS)
    raise NeuroalError(
        f"'{source}' has no column 'text' or 'input_ids', and none of chat data ({chat}): its "
        f"columns are {', '.join(names)}: say which to read, as '{_with_column(source)}'"
    )


def _with_column(source: str) -> str:
    """Return a source, a file or of the hub, as it names a column."""
    empty = 0 if os.path.isfile(source) else max(2 - source.count(":"), 0)
    return f"{source}{':' * empty}:COLUMN"


def row_of(columns: Columns, cells: Mapping[str, Any]) -> Any:
    """Return what a row of these columns is: its cell, or a conversation.

    Raises:
        KeyError: A column is missing.
    """
    if len(columns) > 1:
        there = [column for column in columns if column != OPTIONAL or column in cells]
        return Conversation({column: cells[column] for column in there})
    cell = cells[columns[0]]
    return Conversation({columns[0]: cell}) if _holds_messages(columns, cell) else cell


def _holds_messages(columns: Columns, cell: Any) -> bool:
    """Return whether a cell is a list of messages, or, as `datasets` has them, lists by key."""
    if isinstance(cell, (list, tuple)):
        return isinstance(cell[0], Mapping) if cell else columns in CHAT_COLUMNS
    return isinstance(cell, Mapping) and bool(cell)


def as_rows(source: str, cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of columns that are lists of texts or lists; nothing where they are not.

    Raises:
        NeuroalError: The lists are not of one length.
    """
    lists = list(cells.values())
    if not all(isinstance(x, list) and x and isinstance(x[0], (str, list)) for x in lists):
        return []
    if len({len(x) for x in lists}) > 1:
        sizes = ", ".join(f"{name} {len(x)}" for name, x in cells.items())
        raise NeuroalError(f"the columns of '{source}' differ in length: {sizes}")
    return [dict(zip(cells, row, strict=True)) for row in zip(*lists, strict=True)]


def rows_of_table(columns: Columns, table: Any) -> Sequence[Any]:
    """Return the rows of a table of `datasets`; conversations are made when they are read."""
    first: Sequence[Any] = table[columns[0]]
    if len(columns) > 1 or (len(first) and _holds_messages(columns, first[0])):
        return _Conversations(table, columns)
    return first


@dataclass(frozen=True, eq=False)
class _Conversations(Sequence[Any]):
    table: Any
    columns: Columns

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return row_of(self.columns, self.table[index])

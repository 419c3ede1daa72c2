"""Windows of token ids: what identifies them, and what they begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroal.data.source import Source
from neuroal.errors import NeuroalError, UsageError
from neuroal.types import Bos


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and what identifies them.

    Attributes:
        ids: Token ids, (samples, length), int64, on the CPU.
        source: Text of the source.
        protocol: How they were taken from it; "" if it is unknown.
        bos: The beginning-of-sequence token in front of every window; None if none was put there.
        packed: Whether documents were joined by the end-of-sequence token.
        documents: How many documents they come from; None of rows of token ids.
        notes: What should be known of how they were taken, one line each.
        sha256: Of the ids alone: their little-endian int64 bytes in row-major order.
    """

    ids: Tensor
    source: str
    protocol: str = ""
    bos: str | None = None
    packed: bool = False
    documents: int | None = None
    notes: tuple[str, ...] = ()
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        raw = self.ids.numpy().astype("<i8").tobytes()
        object.__setattr__(self, "sha256", hashlib.sha256(raw).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """Return the report's `data` entry."""
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "windows": samples,
            "length": length,
            "bos": self.bos,
            "packed": self.packed,
            "documents": self.documents,
            "sha256": self.sha256,
        }


class Beginning(NamedTuple):
    """The beginning-of-sequence token that windows get."""

    token: str
    id: int


def beginning(tokenizer: Any, bos: Bos) -> Beginning | None:
    """Return the beginning-of-sequence token that is put in front of every window.

    Under "auto" it is what the tokenizer itself puts in front of a text: what it does is looked at,
    because its settings (`add_bos_token`) often do not say so.

    Args:
        tokenizer: As of transformers; None is a model without one.
        bos: The rule: "auto", "always" or "never".

    Returns:
        The token, or None where windows stay as they are cut.

    Raises:
        UsageError: The rule is "always", and there is no such token.
    """
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos == "never" or (bos == "auto" and token is None):
        return None
    if token is None:
        what = "the model has no tokenizer" if tokenizer is None else "the tokenizer has no"
        rest = ", so no" if tokenizer is None else ""
        raise UsageError(f"{what}{rest} beginning-of-sequence token: give --bos never")
    if bos == "auto" and list(tokenizer("x")["input_ids"][:1]) != [token]:
        return None
    return Beginning(str(tokenizer.bos_token), token)


def on_beginning(first: Beginning | None, bos: Bos) -> tuple[str, ...]:
    """Return the note that windows begin with a token, where they do."""
    if first is None:
        return ()
    why = ", as the tokenizer begins a text" if bos == "auto" else ""
    return (f"every window begins with '{first.token}'{why} (--bos {bos})",)


def begun(ids: Tensor, bos: Beginning | None) -> Tensor:
    """Return windows that begin with the token: (samples, length), as long as before.

    A window that begins otherwise loses its last token to it.
    """
    if bos is None:
        return ids
    front = torch.full_like(ids[:, :1], bos.id)
    return torch.where(ids[:, :1] == bos.id, ids, torch.cat([front, ids[:, :-1]], 1))


def consecutive(
    tokens: Sequence[int], length: int, bos: Beginning | None, most: int | None = None
) -> list[list[int]]:
    """Cut tokens into consecutive windows that begin with the token, and drop the rest.

    Args:
        tokens: Token ids of a text.
        length: Tokens per window, the one in front included.
        bos: What is in front of every window, unless it begins with it in the text.
        most: At most this many windows.
    """
    windows: list[list[int]] = []
    start = 0
    while most is None or len(windows) < most:
        front = [] if bos is None or tokens[start : start + 1] == [bos.id] else [bos.id]
        end = start + length - len(front)
        if end > len(tokens):
            break
        windows.append([*front, *tokens[start:end]])
        start = end
    return windows


def holds_tokens(values: Sequence[Any]) -> bool:
    """Return whether the rows are token ids and not texts."""
    return isinstance(values[0], (list, tuple))


def token_rows(
    source: Source, rows: Sequence[Any], samples: int, length: int | None, context: int | None
) -> Tensor:
    """Return the first rows of token ids unchanged: (samples, length), int64.

    Raises:
        NeuroalError: They are not integers, not of one length, or not of the wanted length.
    """
    rows = list(rows[:samples])
    for row, ids in enumerate(rows, 1):
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int for token in ids):
            raise NeuroalError(f"row {row} of '{source.text}' is not a list of token ids")
        if len(ids) != len(rows[0]):
            raise NeuroalError(
                f"row {row} of '{source.text}' has {len(ids)} token ids and row 1 has "
                f"{len(rows[0])}: windows must be of one length"
            )
    width = len(rows[0])
    if length is not None and width != length:
        raise NeuroalError(
            f"the rows of '{source.text}' have {width} token ids, not {length}: "
            f"give --length {width} or none"
        )
    if width < 2 or (context is not None and width > context):
        bound = "at least 2" if width < 2 else f"at most the model's context of {context}"
        raise NeuroalError(f"the rows of '{source.text}' have {width} token ids, not {bound}")
    try:
        return torch.tensor(rows)
    except (RuntimeError, ValueError, OverflowError):  # differs between versions of torch
        raise NeuroalError(f"'{source.text}' has token ids beyond 64 bits") from None


def refuse_packed_tokens(source: Source, packs: bool | None) -> None:
    """Raise a `UsageError` where rows of token ids were to be packed."""
    if packs:
        raise UsageError(
            f"'{source.text}' holds rows of token ids, which are taken as they are: "
            "--pack-documents is for texts"
        )


def windows_of(ids: Tensor, source: Source, vocabulary: int | None, **what: Any) -> Windows:
    """Return the windows, having checked that every id is one of the model's.

    `what` are the other attributes of `Windows`.
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "" if vocabulary is None else f" (0 to {vocabulary - 1})"
        raise NeuroalError(
            f"'{source.text}' has the token id {low if low < 0 else high}, which is none of the "
            f"model's{known}: tokens and model do not belong together"
        )
    return Windows(ids, source.text, **what)

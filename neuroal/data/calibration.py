"""Text or token rows to windows of token ids."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuroal.data.source import Source, parse_source, read
from neuroal.errors import NeuroalError, UsageError

LONGEST_DEFAULT = 2048

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and what identifies them.

    Attributes:
        ids: Token ids, (samples, length), int64, on the CPU.
        source: Text of the source.
        protocol: How they were taken from it; "" if it is unknown.
        sha256: Of the ids alone: their little-endian int64 bytes in row-major order.
    """

    ids: Tensor
    source: str
    protocol: str = ""
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
            "sha256": self.sha256,
        }


def calibration_windows(
    source: Source | str,
    tokenizer: Any,
    *,
    samples: int,
    length: int | None = None,
    seed: int = 0,
    context: int | None = None,
    vocabulary: int | None = None,
    progress: bool = False,
) -> Windows:
    """Take rows of token ids unchanged, or draw random windows of documents.

    Windows are drawn as by the published code of the Wanda family: with one `random.Random(seed)`,
    document indices until a document is longer than `length`, then a start in
    [0, tokens - length - 1].

    Args:
        source: A `Source` or its text.
        tokenizer: Called like a tokenizer of transformers; may be None for rows of token ids.
        samples: Number of windows; of rows of token ids, the first ones.
        length: Tokens per window; None is the rows' own, for text the smaller of 2048 and
            `context`.
        seed: Seed of the draws.
        context: Longest window that the model takes, if it has a bound.
        vocabulary: Number of token ids that the model knows; None leaves ids unchecked.
        progress: Show the progress bars of downloads.

    Returns:
        The windows, (samples, length).

    Raises:
        UsageError: `samples` or `length` is out of range, or the source text is wrong.
        NeuroalError: The source cannot be read, or holds too little or the wrong thing.
    """
    source = parse_source(source) if isinstance(source, str) else source
    check_sizes(samples, length, context)
    values = read(source, "train", progress=progress)
    if holds_tokens(values):
        if len(values) < samples:
            log.warning(
                "'%s' has %d windows of token ids, not %d", source.text, len(values), samples
            )
            samples = len(values)
        ids = token_rows(source, values, samples, length, context)
    else:
        if source.kind in ("ptb", "wikitext2"):
            values = [joined(source, values, " ")]
        rng = random.Random(seed)
        ids = _draw(source, values, tokenizer, rng, samples, length or default_length(context))
    return windows_of(ids, source, vocabulary)


def _draw(
    source: Source,
    texts: Sequence[Any],
    tokenizer: Any,
    rng: random.Random,
    samples: int,
    length: int,
) -> Tensor:
    long: dict[int, list[int]] = {}  # tokenised once, when first drawn
    short: set[int] = set()
    longest = 0
    drawn: list[list[int]] = []
    while len(drawn) < samples:
        index = rng.randrange(len(texts))
        if index in short:
            continue
        if index not in long:
            tokens = encode(source, tokenizer, joined(source, [texts[index]], first=index + 1))
            longest = max(longest, len(tokens))
            if len(tokens) > length:
                long[index] = tokens
            else:
                short.add(index)
                if len(short) == len(texts):
                    raise NeuroalError(
                        f"no document of '{source.text}' is longer than {length} tokens, the "
                        f"longest has {longest}: {cure(longest - 1)}"
                    )
                continue
        tokens = long[index]
        start = rng.randint(0, len(tokens) - length - 1)
        drawn.append(tokens[start : start + length])
    return torch.tensor(drawn)


def check_sizes(windows: int | None, length: int | None, context: int | None) -> None:
    """Raise a `UsageError` for a number of windows or a length that no source can give."""
    if windows is not None and windows < 1:
        raise UsageError(f"{windows} windows are too few: give at least 1")
    if length is not None and length < 2:
        raise UsageError(f"length {length} is too short: a window needs at least 2 tokens")
    if length is not None and context is not None and length > context:
        raise UsageError(f"length {length} is more than the model's context of {context} tokens")


def default_length(context: int | None) -> int:
    """Return the length of windows of text if none is asked for."""
    return min(LONGEST_DEFAULT, context or LONGEST_DEFAULT)


def cure(tokens: int) -> str:
    """Return what to do if windows can have at most `tokens` tokens."""
    rounded = 1 << max(tokens, 1).bit_length() - 1
    return f"give more text, or --length {rounded}" if rounded > 1 else "give more text"


def holds_tokens(values: Sequence[Any]) -> bool:
    """Return whether the rows are token ids and not texts."""
    return isinstance(values[0], (list, tuple))


def joined(source: Source, texts: Sequence[Any], separator: str = "", first: int = 1) -> str:
    """Return the texts as one; the first is row `first` of the source."""
    for row, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise NeuroalError(f"row {row} of '{source.text}' is {text!r:.40}, not text")
    return separator.join(texts)


def encode(source: Source, tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, special tokens included, however long it is."""
    if tokenizer is None:
        raise NeuroalError(
            f"the model has no tokenizer to read '{source.text}' with: give a file of input_ids"
        )
    # verbose=False: no warning that the text is longer than the model's context.
    return list(tokenizer(text, verbose=False)["input_ids"])


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


def windows_of(ids: Tensor, source: Source, vocabulary: int | None, protocol: str = "") -> Windows:
    """Return the windows, having checked that every id is one of the model's."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "" if vocabulary is None else f" (0 to {vocabulary - 1})"
        raise NeuroalError(
            f"'{source.text}' has the token id {low if low < 0 else high}, which is none of the "
            f"model's{known}: tokens and model do not belong together"
        )
    return Windows(ids, source.text, protocol)

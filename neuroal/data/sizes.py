"""How many windows there may be, how long they are, and what to do where a text is too short."""

from __future__ import annotations

from neuroal.errors import UsageError

LONGEST_DEFAULT = 2048


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


def cure(tokens: int, packs: bool = False) -> str:
    """Return what to do if windows can have at most `tokens` tokens; `packs`: or be packed."""
    rounded = 1 << max(tokens, 1).bit_length() - 1
    ways = ["give more text"]
    ways += [f"--length {rounded}"] if rounded > 1 else []
    ways += ["--pack-documents, which joins them"] if packs else []
    return ", or ".join(ways)

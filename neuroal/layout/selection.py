"""Which linears a pattern means: a name, a glob, the first or last blocks, attention or MLP."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase

from neuroal.errors import UsageError, nearest
from neuroal.layout.parts import Layout, Linear

PARTS = ("attention", "mlp")
_ENDS = re.compile(r"(first|last):(\d+)")


def selected(layout: Layout, patterns: Iterable[str], option: str) -> frozenset[str]:
    """Return the names of the linears that at least one pattern means.

    A pattern is `first:N` or `last:N` (the linears of that many blocks), `attention` or `mlp`, as
    the layout tells them apart, or the full dotted name of a linear, or of a module, which means
    all linears in it. Names may be globs, whose `*` stands for dots too.

    Args:
        layout: The model's.
        patterns: Any number.
        option: Who asks, for the message of an error.

    Raises:
        UsageError: A pattern means no linear.
    """
    return frozenset(n for pattern in patterns for n in _meant(layout, pattern, option))


def kept_linears(layout: Layout, keep: Iterable[str], only: Iterable[str]) -> frozenset[str]:
    """Return the linears that `--keep` means, and those that `--only` does not.

    Raises:
        UsageError: A pattern means no linear, or no linear is left to prune.
    """
    kept = selected(layout, keep, "--keep")
    if only:
        kept |= layout.linears.keys() - selected(layout, only, "--only")
    if len(kept) == len(layout.linears):
        raise UsageError("--keep and --only leave no linear to prune")
    return kept


def _meant(layout: Layout, pattern: str, option: str) -> set[str]:
    ends = _ENDS.fullmatch(pattern)
    if ends is not None:
        return _of_blocks(layout, ends[1], int(ends[2]), f"{option} {pattern}")
    if pattern in PARTS:
        found = {name for name, x in layout.linears.items() if x.part == pattern}
    else:
        found = {name for name in layout.linears if matches(name, pattern)}
    if not found:
        raise UsageError(
            f"{option} {pattern} means no linear of a block (no others are pruned): "
            f"{_hint(layout, pattern)}"
        )
    return found


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern means a linear by its name, or by that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:k]), pattern) for k in range(len(parts), 0, -1))


def _of_blocks(layout: Layout, end: str, count: int, asked: str) -> set[str]:
    if not 1 <= count <= len(layout.blocks):
        raise UsageError(f"{asked} is not one of the {len(layout.blocks)} blocks")
    blocks = layout.blocks[:count] if end == "first" else layout.blocks[-count:]
    return {x.name for block in blocks for x in block.linears}


def _hint(layout: Layout, pattern: str) -> str:
    """Return what a pattern may have meant: the nearest of all, else what there is to choose."""
    short = {"first:1", "last:1", *PARTS}
    short |= {f"*.{x.name.rpartition('.')[2]}" for x in layout.linears.values()}
    globs = {g for x in layout.linears.values() for g in _globs(x, layout.blocks[x.block].name)}
    known = short | globs | layout.linears.keys()
    return nearest(pattern, known if get_close_matches(pattern, known, n=1) else short)


def _globs(linear: Linear, block: str) -> Iterator[str]:
    """Yield `*.self_attn.q_proj` and `*.self_attn` for a linear of a block."""
    local = [p for p in linear.name.removeprefix(f"{block}.").split(".") if not p.isdigit()]
    for k in range(len(local)):
        yield ".".join(["*", *local[k:]])
        if k:
            yield ".".join(["*", *local[:k]])

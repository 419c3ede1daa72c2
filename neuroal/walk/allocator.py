"""Memory that is free, and that the allocator of the C library would keep."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return freed memory to the system, where its allocator (glibc) would keep it.

    A walk allocates and frees thousands of tensors, and what lies free between two that are in use
    is kept for the next that fits: of a model of 135 M weights up to as much as its weights take.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    """Return glibc's `malloc_trim`, or elsewhere what does nothing."""
    if not sys.platform.startswith("linux"):
        return int
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", int)  # musl has none
    return trim

"""Memory that is free, and that the allocator of the C library would keep."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cache

SECONDS = 0.25  # between two times: one takes some milliseconds, the more the more lies free

_last = -SECONDS


def give_back() -> None:
    """Return freed memory to the system, where its allocator (glibc) would keep it.

    A walk allocates and frees thousands of tensors, and what lies free between two that are in use
    is kept for the next that fits: of a model of 135 M weights up to twice what its weights take.
    To be called after every piece of work; soon after the last time it does nothing.
    """
    global _last
    if time.perf_counter() - _last >= SECONDS:
        _trim()(0)
        _last = time.perf_counter()


@cache
def _trim() -> Callable[[int], int]:
    """Return glibc's `malloc_trim`, or elsewhere what does nothing."""
    if not sys.platform.startswith("linux"):
        return int
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", int)  # musl has none
    return trim

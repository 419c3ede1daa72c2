"""How long the phases of a run take, and how much memory they need."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Phases:
    """The phases of one run so far, in the order in which they ended.

    Attributes:
        seconds: Of each phase, over all of its parts.
        memory: Peak bytes up to the end of each phase.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase, or another part of it; what ends in an exception is not recorded."""
        start = time.perf_counter()
        yield
        before = self.seconds.pop(name, 0.0)
        self.seconds[name] = before + time.perf_counter() - start
        self.memory.pop(name, None)
        self.memory[name] = peak_memory()


def peak_memory() -> int:
    """Return the peak bytes of the accelerator in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

"""What has to be looked at once it is computed: all of it in one wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuroal.errors import NeuroalError


class Unchecked:
    """Flags that nobody has looked at, with the error that each would be."""

    def __init__(self) -> None:
        """Begin with none."""
        self._flags: list[tuple[Tensor, Callable[[], NeuroalError]]] = []

    def add(self, holds: Tensor, error: Callable[[], NeuroalError]) -> None:
        """Add a flag, 0-d bool, which may still be in the making."""
        self._flags.append((holds, error))

    def look(self, *numbers: Tensor) -> list[float]:
        """Look at all flags, and return numbers, 0-d each; waits for the device once.

        Raises:
            NeuroalError: Of the first flag, in the order of adding, that does not hold.
        """
        flags, self._flags = self._flags, []
        waiting = [holds for holds, _ in flags] + list(numbers)
        if not waiting:
            return []
        found: list[float] = torch.cat([x.reshape(1) for x in waiting]).tolist()
        for (_, error), holds in zip(flags, found, strict=False):
            if not holds:
                raise error()
        return found[len(flags) :]

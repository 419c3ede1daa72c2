"""How far two masks agree, counted bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from neuroal.layout import Layout, matrices

Masks = Mapping[str, int]
"""A linear's mask by name, as the bits of one number: 1 = pruned, row by row."""


@dataclass(frozen=True)
class MaskOverlap:
    """How far two masks agree; the agreements of linears add up.

    Attributes:
        both: How many weights both prune.
        either: How many at least one prunes.
        equal: How many both prune or both keep.
        weights: How many there are.
    """

    both: int = 0
    either: int = 0
    equal: int = 0
    weights: int = 0

    def __add__(self, other: MaskOverlap) -> MaskOverlap:
        return MaskOverlap(
            self.both + other.both,
            self.either + other.either,
            self.equal + other.equal,
            self.weights + other.weights,
        )

    @property
    def overlap(self) -> float:
        """Intersection over union of what is pruned; 1 where neither prunes anything."""
        return self.both / self.either if self.either else 1.0

    @property
    def share(self) -> float:
        """Share of the weights that both treat alike."""
        return self.equal / self.weights

    def to_json(self) -> dict[str, float]:
        """Return both numbers."""
        return {"intersection_over_union": self.overlap, "equal_share": self.share}


def masks_of(model: nn.Module, layout: Layout) -> dict[str, int]:
    """Return the zeros of every linear of a model in memory."""
    masks = {}
    for name, linear in layout.linears.items():
        zero = (matrices.weight(linear, model) == 0).cpu().numpy()
        masks[name] = int.from_bytes(np.packbits(zero).tobytes())
    return masks


def agreement(one: int, other: int, count: int) -> MaskOverlap:
    """Compare two masks of `count` bits."""
    return MaskOverlap(
        both=(one & other).bit_count(),
        either=(one | other).bit_count(),
        equal=count - (one ^ other).bit_count(),
        weights=count,
    )

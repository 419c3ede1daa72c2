"""Layouts that tests of several plugins share."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from neuroal import Block, Layout, Linear
from neuroal.layout import Fed, Rows


@pytest.fixture(scope="session")
def with_heads() -> Callable[[bool], Layout]:
    """The layout of an attention with grouped heads, its q, k and v fused or not."""

    def build(fused: bool) -> Layout:
        """Four query heads of width 2, two of keys and values, the output and one more."""
        runs = tuple((2 * (h // 2), 2 * h, 2) for h in range(4))  # row of v, column of o
        if fused:  # q, k and v are rows 0 to 7, 8 to 11 and 12 to 15
            named = (Rows("q", ((0, 8),)), Rows("k", ((8, 12),)), Rows("v", ((12, 16),)))
            fed = Fed("0.o", tuple((r + 12, c, n) for r, c, n in runs))
            first = [replace(Linear("0.qkv", 0, 16, 8, 0, None), rows=named, fed=fed)]
        else:
            first = [
                replace(Linear("0.q", 0, 8, 8, 0, None), rows=(Rows("q", ((0, 8),)),)),
                replace(Linear("0.k", 0, 4, 8, 0, None), rows=(Rows("k", ((0, 4),)),)),
                replace(
                    Linear("0.v", 0, 4, 8, 0, None),
                    rows=(Rows("v", ((0, 4),)),),
                    fed=Fed("0.o", runs),
                ),
            ]
        return Layout(
            (
                Block(0, "0", (*first, Linear("0.o", 0, 8, 8, 1, "1.up"))),
                Block(1, "1", (Linear("1.up", 1, 4, 8, 0, None),)),
            )
        )

    return build

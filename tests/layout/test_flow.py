"""What rows are and feed, against what the structure says by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal.layout import Fed, find
from neuroal.testing import tiny_model


class Toy(nn.Module):
    """One block of two linears; `between` is what lies between them."""

    def __init__(self, rows: int, columns: int, between: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        block = nn.Module()
        block.up, block.down = nn.Linear(4, rows), nn.Linear(columns, 4)
        block.forward = lambda x: x + block.down(between(block.up(x)))  # type: ignore[method-assign]
        self.blocks = nn.ModuleList([block])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return self.blocks[0](self.embed(input_ids))


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 3, 2).transpose(1, 2)


FLOWS: dict[str, tuple[int, int, Any, tuple[tuple[int, int, int], ...] | None]] = {
    "pointwise": (6, 6, lambda x: torch.tanh(x) * 2 + 1, ((0, 0, 6),)),
    "norm": (6, 6, nn.LayerNorm(6), ((0, 0, 6),)),
    "root of squares": (6, 6, lambda x: x * x.pow(2).mean(-1, True).rsqrt(), ((0, 0, 6),)),
    "a part": (6, 4, lambda x: x[..., 2:], ((2, 0, 4),)),
    "halves meet": (6, 3, lambda x: x[..., :3] * x[..., 3:], ((0, 0, 3), (3, 0, 3))),
    "turned round": (6, 6, lambda x: x.flip(-1), tuple((5 - i, i, 1) for i in range(6))),
    "with others": (6, 8, lambda x: torch.cat([x, torch.ones(1, 8, 2)], -1), ((0, 0, 6),)),
    "heads repeated": (
        6,
        12,
        lambda x: heads(x).repeat_interleave(2, dim=1).transpose(1, 2).flatten(2),
        ((0, 0, 2), (0, 2, 4), (2, 6, 4), (4, 10, 2)),  # heads 0 0 1 1 2 2
    ),
    "tokens mixed": (6, 6, lambda x: torch.softmax(torch.ones(8, 8), -1) @ x, ((0, 0, 6),)),
    "tokens added": (6, 6, lambda x: x.cumsum(dim=1), ((0, 0, 6),)),
    "columns mixed": (6, 6, lambda x: x @ torch.ones(6, 6), None),
    "columns added": (6, 6, lambda x: x.sum(-1, keepdim=True).expand_as(x), None),
    "scores of attention": (6, 8, lambda x: torch.softmax(x @ x.mT, -1), None),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOWS)
def test_flow(case: str) -> None:
    rows, columns, between, runs = FLOWS[case]
    linear = find(Toy(rows, columns, between)).linears["blocks.0.up"]
    assert linear.fed == (None if runs is None else Fed("blocks.0.down", runs))


def test_gate_and_up_of_a_fused_linear() -> None:
    def gated(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        return up * nn.functional.silu(gate)

    linear = find(Toy(6, 3, gated)).linears["blocks.0.up"]
    assert [(r.name, r.ranges) for r in linear.rows] == [("up", ((0, 3),)), ("gate", ((3, 6),))]


def test_grouped_heads_of_a_model() -> None:
    """Four query heads of eight share two key/value heads; the output reads the query heads."""
    found = find(tiny_model("mistral")).linears
    at = "model.layers.0.self_attn."
    assert {k: [r.name for r in found[f"{at}{k}_proj"].rows] for k in "qkv"} == {
        "q": ["q"],
        "k": ["k"],
        "v": ["v"],
    }
    fed = found[f"{at}v_proj"].fed
    assert fed is not None and fed.linear == f"{at}o_proj"
    rows_of_columns = {c + i: r + i for r, c, n in fed.runs for i in range(n)}
    assert rows_of_columns == {c: c % 8 + 8 * (c // 16) for c in range(32)}
    assert found[f"{at}q_proj"].fed is found[f"{at}k_proj"].fed is None

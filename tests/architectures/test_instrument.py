"""The instrument itself, on a model made by hand and a page of two rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .check import Outcome, windows
from .count import count, kind_of, stacks
from .page import label, page, read
from .tiny import VOCABULARY, architectures, shard, tiny_model


class Block(nn.Module):
    """One of each: what multiplies, and what has two dimensions and does not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.fused = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8, bias=False))
        self.transposed = Conv1D(8, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.heads = nn.Parameter(torch.randn(2, 4, 4))
        self.heads_bias = nn.Parameter(torch.randn(2, 1, 4))
        self.decay = nn.Parameter(torch.randn(8, 8))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.fused(x))
        if self.causal:
            x = x.cumsum(1)
        else:
            x = x + x.mean(1, keepdim=True)
        x = x @ self.experts[1]
        split = x.reshape(-1, 2, 4).transpose(0, 1)  # (heads, windows * tokens, width)
        split = torch.baddbmm(self.heads_bias, split, self.heads)
        x = split.transpose(0, 1).reshape(x.shape)
        return x * self.decay.exp().mean()


class Toy(nn.Module):
    """Two blocks, and a stack that tokens reach only with `tower`."""

    config: Any = SimpleNamespace()

    def __init__(self, causal: bool = True, tower: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(Block(causal) for _ in range(2))
        self.layers[1].experts = self.layers[0].experts  # shared: counted once
        self.pictures = nn.ModuleList([Block(causal)] if tower else [])
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def test_count_is_what_multiplies_in_blocks() -> None:
    counted = count(Toy(), windows())
    own = ["fused.0.weight", "fused.1.weight", "transposed.weight", "experts", "heads"]
    names = [f"layers.{i}.{x}" for i in (0, 1) for x in own]
    names.remove("layers.1.experts")
    assert sorted(counted.matrices) == sorted(names)
    assert sorted(counted.idle) == ["layers.0.unused.weight", "layers.1.unused.weight"]
    assert counted.towers == ()


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Toy(), "decoder"),
        (Toy(causal=False), "encoder"),
        (Toy(tower=True), "multimodal"),
    ],
)
def test_kind_is_told_by_running(model: Toy, kind: str) -> None:
    assert kind_of(model, count(model, windows()), windows())[0] == kind


def test_stacks_are_the_outermost_lists() -> None:
    assert list(stacks(Toy(tower=True))) == ["layers", "pictures"]


def test_tiny_models_are_the_same_every_time_and_hold_no_zero_in_their_matrices() -> None:
    one, two = tiny_model("xlstm"), tiny_model("xlstm")  # gates start as zeros there
    for name, p in one.named_parameters():
        assert torch.equal(p, two.get_parameter(name))
    assert all(bool(p.all()) for p in count(one, windows()).matrices.values())


def test_shards_are_disjoint_and_complete() -> None:
    names = list(architectures())
    parts = [shard(names, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="shard '5/4' is not such as 1/4"):
        shard(names, "5/4")


def test_page_is_read_back_as_written() -> None:
    rows = [
        Outcome("llama", "LlamaForCausalLM", "decoder", "supported"),
        Outcome("bert", "BertLMHeadModel", "encoder", "", "a token's | *logits*"),
        Outcome("git", "GitForCausalLM", "multimodal", "fails", "no"),
        Outcome("gemma3n", "Gemma3nForConditionalGeneration", "unknown", "", "no"),
    ]
    version, labels = read(page(rows))
    assert version == transformers.__version__
    assert labels == {row.model_type: label(row) for row in rows}
    assert labels["git"] == "multimodal fails"

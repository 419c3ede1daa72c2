"""Blocks, linears and consumers of the four structures, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal import Layout, NeuroalError
from neuroal.layout import find
from neuroal.layout.matrices import weight
from neuroal.testing import STRUCTURES, layout, tiny_model

GATED = {
    "self_attn.q_proj": (32, 32, 0, "self_attn.o_proj"),
    "self_attn.k_proj": (32, 32, 0, "self_attn.o_proj"),
    "self_attn.v_proj": (32, 32, 0, "self_attn.o_proj"),
    "self_attn.o_proj": (32, 32, 1, "mlp.gate_proj"),
    "mlp.gate_proj": (48, 32, 2, "mlp.down_proj"),
    "mlp.up_proj": (48, 32, 2, "mlp.down_proj"),
    "mlp.down_proj": (32, 48, 3, "next self_attn.q_proj"),
}
# name: rows, columns, group, consumer; as the methods page reads each structure.
EXPECTED: dict[str, dict[str, tuple[int, int, int, str | None]]] = {
    "llama": {**GATED},
    "mistral": {
        **GATED,
        "self_attn.q_proj": (32, 32, 0, None),
        "self_attn.k_proj": (16, 32, 0, None),
        "self_attn.v_proj": (16, 32, 0, None),
    },
    "phi": {
        "self_attn.q_proj": (32, 32, 0, "self_attn.dense"),
        "self_attn.k_proj": (32, 32, 0, "self_attn.dense"),
        "self_attn.v_proj": (32, 32, 0, "self_attn.dense"),
        "self_attn.dense": (32, 32, 1, "mlp.fc1"),
        "mlp.fc1": (48, 32, 2, "mlp.fc2"),
        "mlp.fc2": (32, 48, 3, "next self_attn.q_proj"),
    },
    "opt": {
        "self_attn.q_proj": (32, 32, 0, "self_attn.out_proj"),
        "self_attn.k_proj": (32, 32, 0, "self_attn.out_proj"),
        "self_attn.v_proj": (32, 32, 0, "self_attn.out_proj"),
        "self_attn.out_proj": (32, 32, 1, "fc1"),
        "fc1": (48, 32, 2, "fc2"),
        "fc2": (32, 48, 3, "next self_attn.q_proj"),
    },
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@each_structure
def test_structure(structure: str) -> None:
    found = find(tiny_model(structure, blocks=2))
    folder = "model.decoder.layers" if structure == "opt" else "model.layers"
    assert [b.name for b in found.blocks] == [f"{folder}.0", f"{folder}.1"]
    for b, block in enumerate(found.blocks):
        assert block.index == b
        for x, (name, row) in zip(block.linears, EXPECTED[structure].items(), strict=True):
            rows, columns, group, consumer = row
            if consumer is not None and consumer.startswith("next "):
                consumer = consumer.removeprefix("next ")
                consumer = f"{folder}.{b + 1}.{consumer}" if b == 0 else None
            elif consumer is not None:
                consumer = f"{folder}.{b}.{consumer}"
            assert x.name == f"{folder}.{b}.{name}"
            assert (x.block, x.group, x.paired) == (b, group, consumer)
            assert (x.out_features, x.in_features, x.weights) == (rows, columns, rows * columns)
            assert x.part == ("attention" if name.startswith("self_attn") else "mlp")


@each_structure
def test_meta_tensors_give_the_same_layout(structure: str) -> None:
    model: Any = tiny_model(structure)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert all(p.is_meta for p in skeleton.parameters())
    assert find(skeleton) == find(model)


@each_structure
def test_finding_leaves_the_model_as_it_was(structure: str) -> None:
    model = tiny_model(structure)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find(model)
    assert all(before[k].equal(v) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_counts() -> None:
    found = find(tiny_model("llama", blocks=2))
    block = 4 * 32 * 32 + 3 * 32 * 48
    assert [b.weights for b in found.blocks] == [block, block]
    assert found.weights == 2 * block
    assert list(found.linears) == [x.name for b in found.blocks for x in b.linears]
    assert len(found.linears) == 14


def test_per_block() -> None:
    found = layout(2, {"a": (2, 2), "b": (2, 2)})
    expected = {"blocks.0.a": 0.1, "blocks.0.b": 0.1, "blocks.1.a": 0.2, "blocks.1.b": 0.2}
    assert found.per_block([0.1, 0.2]) == expected
    assert found.per_block({0: 0.1, 1: 0.2}) == expected


# -- toy models ------------------------------------------------------------------------------


class Mlp(nn.Module):
    """x + down(tanh(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Embeddings, blocks and a head; `blocks` may be anything."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 11)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def refused(model: nn.Module, message: str) -> None:
    with pytest.raises(NeuroalError, match=message):
        find(model)


def test_a_toy_by_hand() -> None:
    found: Layout = find(Toy(Mlp(), Mlp()))
    rows = [(x.name, x.group, x.paired, x.part) for x in found.linears.values()]
    assert rows == [
        ("blocks.0.up", 0, "blocks.0.down", "attention"),
        ("blocks.0.down", 1, "blocks.1.up", "mlp"),
        ("blocks.1.up", 0, "blocks.1.down", "attention"),
        ("blocks.1.down", 1, None, "mlp"),
    ]


def test_linears_count_in_execution_order_and_not_in_that_of_definition() -> None:
    class Late(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Any:
            return x + self.down(self.gate(x) * self.up(x))

    found = find(Toy(Late()))
    assert [x.name for x in found.linears.values()] == [
        "blocks.0.gate",
        "blocks.0.up",
        "blocks.0.down",
    ]
    assert [x.group for x in found.linears.values()] == [0, 0, 1]


def test_experts_inside_a_block_are_not_the_list_of_blocks() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Mlp(), Mlp()])

        def forward(self, x: Tensor) -> Any:
            return self.experts[0](x) + self.experts[1](x)

    found = find(Toy(Experts(), Experts()))
    assert [b.name for b in found.blocks] == ["blocks.0", "blocks.1"]
    assert len(found.linears) == 8


def test_a_list_of_plain_linears_is_no_list_of_blocks() -> None:
    class Heads(Toy):
        def __init__(self) -> None:
            super().__init__(Mlp())
            self.heads = nn.ModuleList([nn.Linear(4, 11), nn.Linear(4, 11)])

    assert [b.name for b in find(Heads()).blocks] == ["blocks.0"]


def test_no_list_of_blocks() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Mlp(), Mlp()

    refused(Flat(), "Flat has no list of decoder blocks: looked for an nn.ModuleList whose")
    refused(Toy(), "no list of decoder blocks")


def test_several_lists_count_in_execution_order() -> None:
    class Stacks(Toy):
        def __init__(self) -> None:
            super().__init__(Mlp())
            self.first = nn.ModuleList([Mlp()])
            self.unused = nn.ModuleList([Mlp()])

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return self.head(self.blocks[0](self.first[0](self.embed(input_ids))))

    found = find(Stacks())
    assert [b.name for b in found.blocks] == ["first.0", "blocks.0"]
    assert found.linears["first.0.down"].paired == "blocks.0.up"


def test_conv1d_is_a_transposed_linear() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config)
    found = find(model)
    rows = [(x.name, x.out_features, x.in_features, x.paired) for x in found.linears.values()]
    assert rows == [
        ("transformer.h.0.attn.c_attn", 24, 8, None),
        ("transformer.h.0.attn.c_proj", 8, 8, "transformer.h.0.mlp.c_fc"),
        ("transformer.h.0.mlp.c_fc", 32, 8, "transformer.h.0.mlp.c_proj"),
        ("transformer.h.0.mlp.c_proj", 8, 32, None),
    ]
    for x in found.linears.values():
        assert x.place.transposed
        assert weight(x, model).equal(model.get_parameter(f"{x.name}.weight").T)


def test_weights_that_are_no_linears_are_skipped_with_the_reason() -> None:
    class Odd(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(4))  # a vector is no matrix
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.conv = nn.Conv1d(4, 4, 2)
            self.position = nn.Embedding(8, 4)
            self.spare = nn.Linear(4, 4)
            self.gate = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Any:
            return super().forward(x + self.position.weight) * self.gate(x) + self.table[0]

    found = find(Toy(Odd()))
    assert list(found.linears) == ["blocks.0.up", "blocks.0.down"]
    assert {(s.name.removeprefix("blocks.0."), s.shape, s.reason) for s in found.skipped} == {
        ("table", (4, 4), "multiplies no input as a matrix"),
        ("conv.weight", (4, 4, 2), "convolution kernel"),
        ("position.weight", (8, 4), "embedding: looked up, not multiplied"),
        ("spare.weight", (4, 4), "does not run in the forward pass"),
        ("gate.weight", (1, 4), "gate: one output"),
    }


def test_a_quantised_weight() -> None:
    class Quantised(Mlp):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.zeros(6, 4, dtype=torch.int8)
            self.up.weight = nn.Parameter(weight, requires_grad=False)

    refused(Toy(Quantised()), r"blocks\.0\.up\.weight is quantised \(torch\.int8\)")


def test_a_model_of_which_a_part_is_offloaded() -> None:
    model = Toy(Mlp(), Mlp())
    model.blocks[1].to("meta")
    refused(model, r"blocks\.1\.up\.weight is not in memory \(offloaded\): load the whole model")


def test_a_shared_weight_counts_once_where_it_runs_first() -> None:
    one, two = Mlp(), Mlp()
    two.up.weight = one.up.weight
    found = find(Toy(one, two))
    assert list(found.linears) == ["blocks.0.up", "blocks.0.down", "blocks.1.down"]
    assert not found.skipped
    assert found.weights == 3 * 24


def test_a_linear_that_runs_twice_counts_once() -> None:
    class Twice(Mlp):
        def forward(self, x: Tensor) -> Any:
            return super().forward(super().forward(x))

    assert list(find(Toy(Twice())).linears) == ["blocks.0.up", "blocks.0.down"]


def test_a_model_that_does_not_run() -> None:
    class Deaf(Toy):
        def forward(self, pixels: Tensor) -> Any:  # type: ignore[override]
            return pixels

    model = Deaf(Mlp())
    refused(model, "Deaf does not run on 8 tokens as a causal language model: TypeError")
    assert not any(m._forward_pre_hooks for m in model.modules())

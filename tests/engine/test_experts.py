"""Experts: statistics of the tokens routed to each, and what is said of those without any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroal
from neuroal import Recipe
from neuroal.layout import find
from neuroal.layout.matrices import weight
from neuroal.model import pretrained
from neuroal.walk import CandidateState, Walker
from neuroal.walk.statistics import resolve

pytest.importorskip(
    "transformers.conversion_mapping", reason="stacks of experts came with transformers 5"
)

VOCABULARY = 97


def mixtral(**more: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config: Any = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0, **more,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def windows(samples: int = 6, length: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (samples, length), generator=rng)


def dense_statistics(model: nn.Module, ids: Tensor, batch: int) -> dict[str, Any]:
    walker = Walker(model, find(model))
    inputs = walker.inputs(ids, batch)
    state, found = CandidateState.start(inputs), {}
    for block in walker.layout.blocks:
        with walker.block(block) as module:
            run = walker.run(block, module, inputs, state, resolve({"input_norm", "input_sum"}))
            found |= run.statistics
            assert run.state is not None
            state = run.state
    return found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_statistics_are_of_the_tokens_routed_to_an_expert(implementation: str, batch: int) -> None:
    """Against the experts' own forward, taken apart by hand."""
    model, ids = mixtral(experts_implementation=implementation), windows()
    given: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: given.append((args[0], args[1])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    [(hidden, chosen)] = given
    found = dense_statistics(model, ids, batch)
    for e in range(4):
        tokens = hidden[(chosen == e).any(dim=1)].double()
        name = f"model.layers.0.mlp.experts.gate_up_proj.{e}"
        assert found[name].tokens == len(tokens)
        norm = (tokens.square().sum(dim=0) / len(ids)).sqrt()
        assert torch.allclose(found[name].input_norm.double(), norm, rtol=1e-5)
        gate, up = (tokens @ experts.gate_up_proj[e].double().T).chunk(2, dim=1)
        inner = nn.functional.silu(gate) * up
        down = found[f"model.layers.0.mlp.experts.down_proj.{e}"]
        total = inner.sum(dim=0) / len(ids)
        assert torch.allclose(down.input_sum.double(), total, rtol=1e-4, atol=1e-6)


def idle(model: Any, expert: int) -> None:
    """Let the first block's router never choose an expert."""
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate.weight
        router[expert] = 0
        model.model.layers[0].post_attention_layernorm.weight.abs_()
    gate = model.model.layers[0].mlp.gate
    original = gate.forward

    def forward(hidden: Tensor) -> Any:
        logits = nn.functional.linear(hidden.reshape(-1, 32), gate.weight)
        logits[:, expert] = -1e9
        top, chosen = torch.topk(torch.softmax(logits.float(), dim=-1), 2)
        return logits, top / top.sum(dim=-1, keepdim=True), chosen

    assert original is not None
    gate.forward = forward


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_said_so() -> None:
    model = mixtral()
    idle(model, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj.2"
    found = find(model)
    before = weight(found.linears[name], model).clone()
    report = neuroal.prune(model, None, Recipe(top_up="uniform"), windows=windows())
    after = weight(found.linears[name], model)
    for row, pruned in zip(before, after, strict=True):  # half of each row, the smallest
        order = row.abs().argsort(stable=True)
        assert not pruned[order[:16]].any() and pruned[order[16:]].equal(row[order[16:]])
    assert any(n.startswith("no calibration token was routed to 2 of 16") for n in report.notes)
    assert any("router: chooses the experts" in n for n in report.notes)
    assert report.sparsity["achieved"] == 0.5


def test_experts_are_found_again_in_the_files(tmp_path: Any) -> None:
    model, ids = mixtral(), windows()
    recipe = Recipe(sparsity=0.5, search_samples=3)
    report = neuroal.prune(model, None, recipe, windows=ids, out=tmp_path / "out")
    said = report.linears["model.layers.1.mlp.experts.gate_up_proj.3"]
    at = "model.layers.1.block_sparse_moe.experts.3."
    assert said["tensors"] == [f"{at}w1.weight", f"{at}w3.weight"]
    again, _ = pretrained.load(str(tmp_path / "out"))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        assert again(input_ids=ids, use_cache=False).logits.equal(logits)
    other = mixtral()
    neuroal.prune(other, None, recipe, windows=ids, out=tmp_path / "out", resume=True)
    assert all(a.equal(b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_all_experts_may_be_shown_all_tokens(implementation: str) -> None:
    model, ids = mixtral(experts_implementation=implementation), windows()
    given: list[Tensor] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    tokens = given[0].double()
    walker = Walker(model, find(model), all_experts=True)
    inputs = walker.inputs(ids, 2)
    state = CandidateState.start(inputs)
    for block in walker.layout.blocks:
        with walker.block(block) as module:
            run = walker.run(block, module, inputs, state, resolve({"input_norm", "input_sum"}))
        assert run.state is not None
        state = run.state
        for e in range(4 if block.index == 0 else 0):
            found = run.statistics[f"model.layers.0.mlp.experts.gate_up_proj.{e}"]
            assert found.tokens == len(tokens)
            norm = (tokens.square().sum(dim=0) / len(ids)).sqrt()
            assert torch.allclose(found.input_norm.double(), norm, rtol=1e-5)
            gate, up = (tokens @ experts.gate_up_proj[e].double().T).chunk(2, dim=1)
            total = (nn.functional.silu(gate) * up).sum(dim=0) / len(ids)
            down = run.statistics[f"model.layers.0.mlp.experts.down_proj.{e}"]
            assert torch.allclose(down.input_sum.double(), total, rtol=1e-4, atol=1e-6)
    pairs = zip(inputs.batches, state.outputs, strict=True)
    walked = torch.cat([walker.logits(batch, outputs) for batch, outputs in pairs])
    assert torch.allclose(walked, logits, atol=1e-6)  # the output is the routed one


def test_all_experts_leave_none_to_magnitude() -> None:
    model = mixtral()
    idle(model, 2)
    recipe = Recipe(top_up="uniform", all_experts=True)
    report = neuroal.prune(model, None, recipe, windows=windows())
    assert not any("no calibration token" in n for n in report.notes)


def test_experts_that_are_called_otherwise_cannot_be_shown_all_tokens() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.stack[0] + x @ self.stack[1]

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 4)
            block = nn.Module()
            block.odd = Odd()
            block.forward = lambda x: block.odd(x)  # type: ignore[method-assign]
            self.blocks = nn.ModuleList([block])

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return SimpleNamespace(logits=self.blocks[0](self.embed(input_ids)))

    model = Toy()
    walker = Walker(model, find(model), all_experts=True)
    inputs = walker.inputs(windows(2))
    [block] = walker.layout.blocks
    with walker.block(block) as module, pytest.raises(neuroal.NeuroalError, match="--all-experts"):
        walker.run(block, module, inputs, CandidateState.start(inputs), resolve({"input_norm"}))

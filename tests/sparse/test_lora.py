"""W + M ⊙ (B A): its values by hand, what is trained, and that merging changes no output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuroal.errors import UsageError
from neuroal.sparse import masked_lora
from neuroal.testing import tiny_model, windows

UP = "model.layers.0.mlp.up_proj"


def pruned_model(structure: str = "llama") -> Any:
    model = tiny_model(structure, blocks=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter.view(-1)[::2] = 0
    return model


def test_values_by_hand() -> None:
    """B A = [1 2]ᵀ [3 4] = [[3, 4], [6, 8]]; it counts where W = [[5, 0], [0, 7]] is not zero."""
    from neuroal.sparse.lora import _Change

    weight = torch.tensor([[5.0, 0.0], [0.0, 7.0]])
    change = _Change(weight, 1, torch.Generator().manual_seed(0))
    assert torch.equal(change(weight), weight)
    with torch.no_grad():
        change.a.copy_(torch.tensor([[3.0, 4.0]]))
        change.b.copy_(torch.tensor([[1.0], [2.0]]))
    assert change(weight).tolist() == [[8, 0], [0, 15]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["llama", "opt"])
def test_merging_changes_no_output_and_no_zero(structure: str, dtype: torch.dtype) -> None:
    model = pruned_model(structure).to(dtype)
    ids = windows(2, 8)
    zeros = {n: p == 0 for n, p in model.named_parameters() if "layers" in n and p.dim() > 1}
    dense, names = model(input_ids=ids).logits, set(model.state_dict())
    lora = masked_lora(model, 2)
    assert torch.equal(model(input_ids=ids).logits, dense)  # B is zero
    optimizer = torch.optim.AdamW(lora.parameters.values(), lr=0.02, weight_decay=0.1)
    for k in range(3):
        optimizer.zero_grad()
        batch = windows(2, 8, k)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    trained = model(input_ids=ids).logits
    assert not torch.equal(trained, dense)
    assert lora.merge() is model
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, trained)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n] == 0, zero) for n, zero in zeros.items())


def test_only_the_factors_of_the_targets_are_trained() -> None:
    model = pruned_model()
    lora = masked_lora(model, 3, ["mlp", "*.q_proj"])
    place = "parametrizations.weight.0"
    wanted = {
        f"model.layers.{k}.{x}.{place}.{factor}"
        for k in range(2)
        for x in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
        for factor in "ab"
    }
    assert set(lora.parameters) == wanted
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    assert lora.parameters[f"{UP}.{place}.a"].shape == (3, 32)
    assert lora.parameters[f"{UP}.{place}.b"].shape == (48, 3)


def test_what_is_removed_leaves_the_model_as_it_was() -> None:
    model = pruned_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lora = masked_lora(model, 2)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.fill_(1)
    lora.remove()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) and after[n].requires_grad for n, p in before.items())


def test_a_seed_decides_the_draw() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 7)
        drawn.append(next(iter(masked_lora(pruned_model(), 2, seed=seed).parameters.values())))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_what_makes_no_sense_is_refused() -> None:
    model: nn.Module = pruned_model()
    with pytest.raises(UsageError, match="rank 0 is too low"):
        masked_lora(model, 0)
    with pytest.raises(UsageError, match=r"target '?mpl'? means no linear.*did you mean 'mlp'"):
        masked_lora(model, 2, ["mpl"])

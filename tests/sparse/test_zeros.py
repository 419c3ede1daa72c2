"""Zeros stay zero under any optimiser, and all else is trained as it would be without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal.sparse import KeepZerosCallback, keep_zeros
from neuroal.testing import tiny_model, windows


class Product(nn.Module):
    """W x with W = [[1, 0], [0, 2]]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.bias


def test_two_steps_by_hand() -> None:
    """SGD, rate 0.1, momentum 0.5, decay 0.1, on L = sum(W x + b) with x = (1, 3).

    dL/dW = [[1, 3], [1, 3]], of which the mask leaves [[1, 0], [0, 3]]. W00: g = 1 + 0.1·1 = 1.1,
    so 0.89; then v = 0.5·1.1 + 1.089 = 1.639, so 0.7261. W11: g = 3.2, so 1.68; then
    v = 1.6 + 3.168 = 4.768, so 1.2032. b: g = 1, so −0.1; then v = 0.5 + 0.99 = 1.49, so −0.249.
    """
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
    with keep_zeros(model) as kept:
        assert kept.masks["weight"].tolist() == [[False, True], [True, False]]
        assert list(kept.masks) == ["weight"] and kept.zeros == 2
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([1.0, 3.0])).sum().backward()
            optimizer.step()
            assert model.weight[0, 1] == model.weight[1, 0] == 0
    expected = torch.tensor([[0.7261, 0.0], [0.0, 1.2032]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.bias.detach(), torch.full((2,), -0.249), rtol=0, atol=1e-6)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, foreach=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_nothing_else_is_zero(name: str) -> None:
    model = pruned_model()
    before = {n: p == 0 for n, p in model.named_parameters() if "layers" in n and p.dim() > 1}
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](model.parameters())
    with keep_zeros(model):
        for k in range(3):
            step(model, optimizer, k)
            for n, p in model.named_parameters():
                if n in before:
                    assert torch.equal(p == 0, before[n]), n
    for n, p in model.named_parameters():
        assert not torch.equal(p, first[n]), n


def test_momentum_from_before_moves_no_zero() -> None:
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):  # momentum everywhere
        model(torch.ones(2)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        model.weight[0, 1] = 0
    with keep_zeros(model):
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()
    assert model.weight[0, 1] == 0 and model.weight[1, 0] != 0


def test_gradients_that_are_not_finite_where_pruned_do_no_harm() -> None:
    model = Product()
    optimizer = torch.optim.AdamW(model.parameters())
    with keep_zeros(model):
        (model(torch.ones(2)).sum() + (model.weight[0, 1] * float("inf"))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert model.weight.isfinite().all() and model.weight[0, 1] == 0


def test_what_is_removed_is_trained_again() -> None:
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep_zeros(model).remove()
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    assert model.weight[0, 1].item() == pytest.approx(-0.1)


def test_an_optimiser_of_ones_own_applies_it() -> None:
    model = Product()
    with keep_zeros(model) as kept, torch.no_grad():
        model.weight += 1
        kept.apply()
    assert model.weight.tolist() == [[2, 0], [0, 3]]


def test_vocabulary_and_what_is_to_be_learnt_from_zero_are_left_alone() -> None:
    model: Any = pruned_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0  # a new token
        model.get_output_embeddings().weight[3] = 0
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    masks = keep_zeros(model).masks
    assert len(masks) == 14 - 2 and all("layers" in name for name in masks)


def test_the_callback_keeps_zeros_in_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra neuroal[finetune]")
    from transformers import Trainer, TrainingArguments

    model: Any = pruned_model()
    rows = [{"input_ids": row, "labels": row} for row in windows(8, 8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.05, weight_decay=0.1, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    zeros = {n: p == 0 for n, p in model.named_parameters() if "layers" in n and p.dim() > 1}
    first = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    Trainer(model, arguments, train_dataset=rows, callbacks=[KeepZerosCallback()]).train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n] == 0, zero) for n, zero in zeros.items())
    assert not torch.equal(first, after["model.layers.0.mlp.up_proj.weight"])


def pruned_model() -> nn.Module:
    """A tiny Llama of two blocks, whose every linear has two of three weights at zero."""
    model = tiny_model("llama", blocks=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter.view(-1)[torch.arange(parameter.numel()) % 3 > 0] = 0
    return model


def step(model: Any, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    ids = windows(2, 8, seed)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

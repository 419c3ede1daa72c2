"""Forms of pruned models: their outputs, their bytes, and what is said of them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from neuroal.bench.forms import CsrLinear, Form, csr, is_24, semi_structured
from neuroal.bench.measuring import compared
from neuroal.bench.speed import memory_bytes, timed
from neuroal.testing import tiny_model, windows

IDS = windows(2, 12)
cutlass = partial(semi_structured, SparseSemiStructuredTensorCUTLASS)


@pytest.fixture
def pruned() -> tuple[nn.Module, list[str]]:
    """A tiny Llama, nine of ten weights in its linears zero, and their names."""
    model = tiny_model("llama", blocks=2)
    draw = torch.Generator().manual_seed(0)
    names = [n for n, x in model.named_modules() if isinstance(x, nn.Linear) and n != "lm_head"]
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight[torch.rand(weight.shape, generator=draw) < 0.9] = 0  # type: ignore[index]
    return model, names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_csr_linear_is_the_dense_product(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(12, 7, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight[:, ::3] = 0
        linear.weight[2] = 0
        inputs = torch.randn(2, 3, 12).to(dtype)
        found = CsrLinear(linear)(inputs)
    assert found.dtype == dtype and found.shape == (2, 3, 7)
    wanted = torch.einsum("oi,bti->bto", linear.weight.double(), inputs.double())
    wanted += linear.bias if bias else 0
    near = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), wanted, atol=near, rtol=near)


def test_csr_form_of_a_model(pruned: tuple[nn.Module, list[str]]) -> None:
    model, names = pruned
    before = copy.deepcopy(model.state_dict())
    form = csr(model, names)
    assert isinstance(form, Form) and form.linears == len(names) == 14
    with torch.no_grad():
        torch.testing.assert_close(form.model(IDS).logits, model(IDS).logits)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    weights = [model.get_submodule(name).weight for name in names]
    kept = sum(int((w != 0).sum()) for w in weights)  # type: ignore[operator, misc]
    rows = sum(len(w) + 1 for w in weights)  # type: ignore[arg-type]
    dense = sum(w.nbytes for w in weights)  # type: ignore[union-attr]
    assert memory_bytes(form.model) == memory_bytes(model) - dense + 8 * kept + 4 * rows


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert memory_bytes(model) == 128
    model[1].weight = model[0].weight
    assert memory_bytes(model) == 64


def test_decoding_goes_on_from_the_prompt() -> None:
    model, seen = tiny_model("llama", blocks=2), []
    model.register_forward_hook(lambda _, given, said: seen.append(said.logits))
    found = timed(model, IDS, 8)
    with torch.no_grad():
        whole = model(IDS).logits
    assert found.decode is not None
    torch.testing.assert_close(torch.cat(seen[:-1], 1), whole)


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (16, 64), (32, 32)])
def test_24_needs_its_groups_and_dimensions(rows: int, columns: int) -> None:
    weight = torch.ones(rows, columns)
    weight[:, ::4] = weight[:, 3::4] = 0
    assert is_24(weight) == ((rows, columns) == (32, 64))
    weight[-1, -1] = 1
    assert not is_24(weight)


def test_24_says_what_it_needs(pruned: tuple[nn.Module, list[str]]) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    assert "--pattern 2:4" in str(cutlass(*pruned)) + str(cutlass(model, ["0"]))
    with torch.no_grad():
        model[0].weight.view(32, 16, 4)[..., :2] = 0
    assert "NVIDIA GPU" in str(cutlass(model, ["0"]))


def test_no_linear_of_its_own_has_no_form() -> None:
    assert "no pruned linear" in str(csr(tiny_model("llama"), ["model.layers.0.mlp.experts.0"]))


def test_a_gain_is_one_in_every_round() -> None:
    faster: dict[str, Any] = compared("decode", 10, [1.0, 2.0, 1.0], [2.0, 3.0, 4.0])
    assert faster["decode_tokens_per_second"] == 10
    assert faster["decode_over_dense"] == 3 and faster["decode_gain"]
    assert not compared("decode", 10, [1.0, 2.0, 4.1], [2.0, 3.0, 4.0])["decode_gain"]
    assert not compared("decode", 10, [1.0, 1.0], [1.04, 1.04])["decode_gain"]
    none = compared("decode", 10, [None], [None])
    assert none["decode_tokens_per_second"] is None and not none["decode_gain"]

"""The kernel against the masks of `pruning.masks`, by Triton's interpreter: no device is needed."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from neuroal import PluginError, hookimpl
from neuroal.layout import find
from neuroal.plugins import load
from neuroal.pruning import masks
from neuroal.pruning import pruner as pruning
from neuroal.pruning.allocation import Allocation
from neuroal.pruning.masks import row_mask, zeroed
from neuroal.pruning.targets import Rules, targets
from neuroal.testing import statistics, tiny_model


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module("neuroal.pruning.kernels")  # interpreted: tests/conftest.py


def expected(weight: Tensor, scores: Tensor, counts: Tensor, last: bool) -> Tensor:
    return zeroed(weight, row_mask(scores, counts, last))


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.view(kind).equal(b.view(kind))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_any_sign_with_ties(kernels: ModuleType, dtype: torch.dtype, last: bool) -> None:
    weight = torch.randn(9, 21).to(dtype)
    scores = torch.randint(-3, 4, (9, 21)).float()
    scores[0] = 0
    scores[1, ::2] = -0.0  # equal to 0
    counts = torch.tensor([0, 21, 10, 1, 20, 7, 13, 5, 11])
    out, finite = kernels.prune_rows(weight, scores, counts, last)
    assert same_bits(out, expected(weight, scores, counts, last))
    assert finite.all() and (out == 0).sum(dim=1).equal(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 16, 100])
def test_the_score_is_made_in_the_kernel(
    kernels: ModuleType, dtype: torch.dtype, columns: int
) -> None:
    weight, norm = torch.randn(5, columns).to(dtype), torch.rand(columns)
    counts = torch.randint(0, columns + 1, (5,))
    out, _ = kernels.prune_rows(weight, norm, counts)
    assert same_bits(out, expected(weight, weight.float().abs() * norm, counts, False))


def test_extremes_keep_their_order(kernels: ModuleType) -> None:
    most, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    scores = torch.tensor([[most, -most, least, -least, 0.0, 1e-42, -1e-42, 1.0]])
    for k in range(9):
        out, _ = kernels.prune_rows(torch.ones(1, 8), scores, torch.tensor([k]))
        assert out.equal(expected(torch.ones(1, 8), scores, torch.tensor([k]), False))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_with_scores_that_are_not_finite_are_told(kernels: ModuleType, bad: float) -> None:
    scores = torch.rand(3, 5)
    scores[1, 2] = bad
    _, finite = kernels.prune_rows(torch.rand(3, 5), scores, torch.tensor([2, 2, 2]))
    assert finite.tolist() == [1, 0, 1]
    norm = torch.tensor([1.0, bad, 1.0])
    _, finite = kernels.prune_rows(torch.ones(2, 3), norm, torch.tensor([1, 1]))
    assert finite.tolist() == [0, 0]


def test_nothing_to_prune(kernels: ModuleType) -> None:
    empty = torch.zeros(0, 4)
    out, finite = kernels.prune_rows(empty, empty, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 4) and finite.shape == (0,)


def test_arguments_are_not_changed_and_need_not_be_contiguous(kernels: ModuleType) -> None:
    weight, scores, counts = torch.randn(6, 4).t(), torch.rand(6, 4).t(), torch.tensor([1, 2, 3, 4])
    before = weight.clone(), scores.clone()
    out, _ = kernels.prune_rows(weight, scores, counts)
    assert out.equal(expected(weight.contiguous(), scores, counts, False))
    assert weight.equal(before[0]) and scores.equal(before[1])


@dataclass(frozen=True, eq=False)
class Own:
    """A score that the kernel does not know."""

    @hookimpl
    def score_weights(self, weight: Tensor) -> Tensor:
        return weight - 0.1


@pytest.mark.parametrize("pruner", ["wanda", Own()])
def test_blocks_are_pruned_as_without_it(
    kernels: ModuleType, pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", blocks=1).bfloat16()
    layout = find(model)
    (block,) = layout.blocks
    module = model.get_submodule(block.name)
    known = {x.name: statistics(input_norm=torch.rand(x.in_features)) for x in block.linears}
    rows = {n: torch.rand(x.out_features).double() for n, x in layout.linears.items()}
    wanted = targets(Allocation.of(rows, layout), layout, Rules(0.5, budget="paper"))
    base = pruning.BasePruner(load([("pruner", pruner)])[0], None, 0)
    expected = base.prune_block(block, module, known, wanted)
    asked: list[torch.dtype] = []

    def by_kernel(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        asked.append(weight.dtype)
        out, finite = kernels.prune_rows(weight, *given)
        return out, finite.all()

    monkeypatch.setattr(pruning, "prune_rows", by_kernel)
    found = base.prune_block(block, module, known, wanted)
    assert asked == [torch.bfloat16] * len(block.linears)
    assert all(same_bits(found[name], weight) for name, weight in expected.items())
    not_finite = torch.tensor(False)
    monkeypatch.setattr(pruning, "prune_rows", lambda weight, *_: (weight, not_finite))
    with pytest.raises(PluginError, match=r"score_weights: returned NaN or infinity"):
        base.prune_block(block, module, known, wanted)


def test_it_is_for_cuda_alone() -> None:
    assert masks._kernels(torch.zeros(2, 4), torch.zeros(2, 4)) is None

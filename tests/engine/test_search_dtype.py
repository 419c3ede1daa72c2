"""The search may run its blocks in another dtype; what is pruned stays the model's own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroal
from neuroal import Recipe, UsageError
from neuroal.layout import find
from neuroal.testing import tiny_model
from neuroal.walk import CandidateState, Walker

IDS = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))


def prune(model: nn.Module, **more: Any) -> neuroal.Report:
    recipe = Recipe(sparsity=0.6, search_samples=2, **more)
    return neuroal.prune(model, None, recipe, windows=IDS)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return tiny_model("llama", blocks=3)


def misalignments(report: neuroal.Report) -> Tensor:
    return torch.tensor([c["misalignment"] for c in report.candidates])


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_a_block_in_another_dtype_is_that_of_a_model_in_it(family: str) -> None:
    model = tiny_model(family, blocks=2)
    whole = copy.deepcopy(model).bfloat16()
    walker, found = Walker(model, find(model)), []
    inputs = walker.inputs(IDS, dtype=torch.bfloat16)
    state = CandidateState.start(inputs)
    for block in walker.layout.blocks:
        with walker.block(block, torch.bfloat16) as module:
            state = walker.run(block, module, inputs, state).state or state
        found.append(state.outputs[0][(block.index, 0)])
    assert found[-1].dtype == torch.bfloat16
    with torch.no_grad():
        expected = whole(input_ids=IDS, use_cache=False).logits
        logits = walker.logits(inputs.batches[0], state.outputs[0])
    assert logits.dtype == torch.float32
    assert (logits - expected.float()).norm() < 0.02 * expected.float().norm()


def test_the_search_is_close_and_the_weights_stay_their_own() -> None:
    plain, half = dense(), dense()
    before = half.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    exact, rounded = prune(plain), prune(half, search_dtype="bfloat16")
    a, b = misalignments(exact), misalignments(rounded)
    assert not a.equal(b) and torch.allclose(a, b, rtol=0.1)
    assert exact.counts["block_runs"] == rounded.counts["block_runs"]
    for name, tensor in half.state_dict().items():
        kept = tensor != 0
        assert tensor.dtype == torch.float32 and tensor[kept].equal(before[name][kept])


@pytest.mark.parametrize("alignment", ["output_kl", "relative_l2"])
def test_other_metrics_search_in_it_too(alignment: str) -> None:
    exact = prune(dense(), alignment=alignment)
    rounded = prune(dense(), alignment=alignment, search_dtype="bfloat16")
    assert torch.allclose(misalignments(exact), misalignments(rounded), rtol=0.2)


def test_the_models_own_dtype_changes_nothing() -> None:
    same = misalignments(prune(dense(), search_dtype="float32"))
    assert same.equal(misalignments(prune(dense())))


def test_batches_of_another_size_have_the_same_result_within_rounding() -> None:
    models = [dense(), dense()]
    a, b = (misalignments(prune(m, batch=n)) for m, n in zip(models, (1, 3), strict=True))
    assert torch.allclose(a, b, rtol=1e-4)


def test_a_wrong_dtype_or_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="search_dtype 'int8' is not known"):
        Recipe(search_dtype="int8")
    with pytest.raises(UsageError, match="batch 0 is not a positive number"):
        Recipe(batch=0)

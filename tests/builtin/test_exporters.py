"""torch-24 and eora: what they write, by slow formulas, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuroal import UsageError
from neuroal.testing import finished_run
from neuroal_plugins.exporter.eora import Eora, companion
from neuroal_plugins.exporter.torch_24 import Torch24

UP = "model.layers.1.mlp.up_proj"


def random(*shape: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


# -- torch-24 ----------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_checkpoint_and_its_loader(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader hands every linear to torch, which gets it back whole from its own form."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )
    from transformers import AutoModelForCausalLM

    run = finished_run(tmp_path / "run")
    said = Torch24().export_run(run, out)
    assert said["linears"] == 14 and said["weights"] == 14 * 64 * 64
    assert said["linears_without_a_kernel"] == [] and said["linears_left_dense"] == 0
    one, other = load_file(run.folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)

    converted: list[Tensor] = []

    def convert(weight: Tensor) -> Tensor:
        assert weight.dtype == torch.float16
        kept, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert kept.numel() * 2 == weight.numel()
        converted.append(weight)
        back: Tensor = sparse_semi_structured_to_dense_cutlass(kept, meta)
        assert torch.equal(back, weight)
        return back

    spec = importlib.util.spec_from_file_location("load_24", out / "load_24.py")
    assert spec is not None and spec.loader is not None
    loader: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    monkeypatch.setattr(loader, "to_sparse_semi_structured", convert)
    model = loader.load(device="cpu")
    assert len(converted) == 14
    expected: Any = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float16)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_group_that_keeps_three_is_named(tmp_path: Path, out: Path) -> None:
    run = finished_run(tmp_path / "run")
    with torch.no_grad():
        weight = run.model.get_parameter(f"{UP}.weight")
        weight[3, 8:12] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    message = "'model.layers.1.mlp.up_proj' is not 2:4: columns 8 to 11 of row 3 keep 3 weights"
    with pytest.raises(UsageError, match=message):
        Torch24().export_run(run, out)
    with pytest.raises(UsageError, match="is not 2:4"):
        Torch24().export_run(finished_run(tmp_path / "half", pattern="unstructured"), out)
    assert not list(out.iterdir())


# -- eora --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_no_matrix_of_the_rank_has_a_smaller_error(rank: int) -> None:
    """By another way: with L Lᵀ = H (Cholesky), the best B A is the truncated D L times L⁻¹."""
    lost, x = random(5, 7, seed=0), random(40, 7, seed=1)
    gram = x.t() @ x
    a, b, before, after = companion(lost, gram, rank, 1e-12)
    assert a.shape == (rank, 7) and b.shape == (5, rank)
    root = torch.linalg.cholesky(gram)
    u, sigma, vt = torch.linalg.svd(lost @ root, full_matrices=False)
    best = (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(b @ a, best)
    # ‖(D − B A) Xᵀ‖² is the error of the outputs, entry by entry.
    assert before == pytest.approx((lost @ x.t()).square().sum().item())
    assert after == pytest.approx(((lost - b @ a) @ x.t()).square().sum().item(), abs=1e-9)
    torch.testing.assert_close(a[:5].norm(dim=1).isfinite(), torch.ones(min(rank, 5)).bool())


def test_factors_by_hand() -> None:
    """H = diag(4, 1), D = [[1, 0], [0, 1]]: D S = diag(2, 1), so B A = [[1, 0], [0, 0]] for rank 1.

    B = U Σ^½ = [√2, 0]ᵀ up to a sign, A = Σ^½ Vᵀ Λ^−½ Qᵀ = [√2 / 2, 0]; 4 of 5 is taken back.
    """
    a, b, before, after = companion(
        torch.eye(2).double(), torch.diag(torch.tensor([4.0, 1.0])).double(), 1, 1e-6
    )
    assert a.abs().tolist() == [[pytest.approx(2**0.5 / 2), pytest.approx(0)]]
    assert b.abs().tolist() == [[pytest.approx(2**0.5)], [pytest.approx(0)]]
    torch.testing.assert_close(b @ a, torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double())
    assert (before, after) == (pytest.approx(5), pytest.approx(1))


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.ones(4, 4)], ids=["zero", "rank one"])
def test_inputs_without_all_directions(gram: Tensor) -> None:
    a, b, _, _ = companion(random(3, 4, seed=0), gram.double(), 2, 1e-6)
    assert a.isfinite().all() and b.isfinite().all() and a.abs().max() < 1e4


def test_the_adapter_is_one_of_peft(tmp_path: Path, out: Path) -> None:
    """Its logits are those of a model with B A in its weights; its counts are of its tensors."""
    peft = pytest.importorskip("peft", reason="the extra neuroal[finetune]")
    run = finished_run(tmp_path / "run", ["gram"])
    said = Eora(rank=4).export_run(run, out)
    tensors = load_file(out / "adapter_model.safetensors")
    assert said["parameters"] == sum(x.numel() for x in tensors.values()) == 14 * 4 * 128
    assert said["bytes"] == 4 * said["parameters"]
    pruned, weights = 14 * 64 * 32, 14 * 64 * 64
    assert said["of_the_pruned_weights"] == said["parameters"] / pruned
    assert said["sparsity"] == 0.5
    assert said["sparsity_left"] == (pruned - said["parameters"]) / weights
    assert 0 < said["output_error_taken_back"] < 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "run").resolve())

    ids = torch.arange(8)[None]
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(run.folder)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, out)(ids).logits
        for x in run.linears():
            prefix = f"base_model.model.{x.linear.name}.lora"
            change = tensors[f"{prefix}_B.weight"] @ tensors[f"{prefix}_A.weight"]
            run.model.get_parameter(f"{x.linear.name}.weight").add_(change)
        wanted = run.model(ids).logits
    torch.testing.assert_close(adapted, wanted)
    assert not torch.allclose(adapted, plain)


def test_an_adapter_of_more_than_was_pruned_says_so(tmp_path: Path, out: Path) -> None:
    """Of rank r it has 128 r parameters beside a matrix of 64 × 64, of which half is pruned."""
    run = finished_run(tmp_path / "run", ["gram"])
    said = Eora(rank=20).export_run(run, out)
    assert said["sparsity_left"] == pytest.approx((64 * 32 - 20 * 128) / 64**2)
    assert said["note"].endswith("more parameters than were pruned: a rank of at most 15 saves")
    assert "note" not in Eora(rank=4).export_run(run, out)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"floor": 0.0}, {"floor": 1.0}])
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Eora(**wrong)

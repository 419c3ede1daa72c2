"""An adapter of peft under a mask: the weights that come out, and the share that is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neuroal.errors import UsageError
from neuroal.sparse import merge_under_mask
from neuroal.testing import tiny_model, windows

peft = pytest.importorskip("peft", reason="the extra neuroal[finetune]")

UP = "model.layers.0.mlp.up_proj"


def pruned_model() -> Any:
    model = tiny_model("llama", blocks=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter[:, ::4] = 0  # a quarter of every row
    return model


def adapter(folder: Path, **options: Any) -> Path:
    """An adapter of one linear: alpha 4 of rank 2 scales B A by 2."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[UP], **options)
    wrapped = peft.get_peft_model(tiny_model("llama", blocks=2), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 5 - 1)
    wrapped.save_pretrained(folder)
    return folder


def test_weights_and_loss_by_a_slow_sum(tmp_path: Path) -> None:
    model = pruned_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merged = merge_under_mask(model, adapter(tmp_path / "adapter"))
    after = dict(merged.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items() if n != f"{UP}.weight")
    a = [[float((r * 32 + c) % 5 - 1) for c in range(32)] for r in range(2)]
    b = [[float((r * 2 + k) % 5 - 1) for k in range(2)] for r in range(48)]
    lost = whole = 0.0
    for i in range(48):
        for j in range(32):
            change = 2 * sum(b[i][k] * a[k][j] for k in range(2))
            old = float(before[f"{UP}.weight"][i, j])
            whole += change**2
            lost += change**2 if old == 0 else 0
            new = 0.0 if old == 0 else old + change
            assert float(after[f"{UP}.weight"][i, j]) == pytest.approx(new, abs=1e-5)
    assert 0.1 < merged.lost < 0.5
    assert merged.lost == pytest.approx(lost / whole)
    assert merged.matrices == {UP: merged.lost}


def test_a_dense_model_loses_nothing_and_becomes_what_peft_makes(tmp_path: Path) -> None:
    folder, ids = adapter(tmp_path / "adapter"), windows(2, 8)
    merged = merge_under_mask(tiny_model("llama", blocks=2), folder)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama", blocks=2), folder)
    assert merged.lost == 0
    torch.testing.assert_close(merged.model(ids).logits, theirs.merge_and_unload()(ids).logits)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no adapter of peft: it holds no adapter_model"):
        merge_under_mask(pruned_model(), tmp_path)
    folder = adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(UsageError, match="is a DoRA"):
        merge_under_mask(pruned_model(), folder)

"""Zeros of saved models against those in memory and against a plain count over the files."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neuroal import Layout, NeuroalError
from neuroal.layout import find, matrices
from neuroal.model import pretrained
from neuroal.model.files import ONE, Shards
from neuroal.model.zeros import count_saved_zeros, count_zeros
from neuroal.testing import tiny_model


def with_zeros(model: nn.Module) -> Layout:
    """Sets about two of five weights of every linear to zero."""
    layout = find(model)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in layout.linears.values():
            weight = matrices.weight(x, model)
            weight[torch.rand(weight.shape, generator=rng) < 0.4] = 0
    return layout


def mixtral() -> Any:
    """A model of experts that are one parameter in memory and many tensors in the files."""
    pytest.importorskip("transformers.conversion_mapping", reason="came with transformers 5")
    from transformers import MixtralConfig, MixtralForCausalLM

    config: Any = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def test_a_saved_model_has_the_zeros_of_its_file_tensors(structure: str, tmp_path: Path) -> None:
    model = tiny_model(structure)
    layout = with_zeros(model)
    pretrained.save(model, None, tmp_path)
    tensors = load_file(tmp_path / ONE)
    saved, memory = count_saved_zeros(tmp_path, layout, model), count_zeros(model, layout)
    assert list(saved) == list(memory) == list(layout.linears)
    for name, zeros in saved.items():
        tensor = tensors[f"{name}.weight"]  # (out, in)
        assert zeros.tensors == (f"{name}.weight",) and memory[name].tensors == ()
        assert zeros.zeros == memory[name].zeros == int((tensor == 0).sum())
        share = torch.tensor([row.tolist().count(0) / len(row) for row in tensor]).double()
        assert torch.allclose(zeros.rows, share) and zeros.rows.dtype == torch.float64
        assert zeros.rows.equal(memory[name].rows)


def test_experts_of_one_parameter_are_counted_in_their_own_tensors(tmp_path: Path) -> None:
    model = mixtral()
    layout = with_zeros(model)
    model.save_pretrained(tmp_path, max_shard_size="15kB")  # in many files, cut anywhere
    shards = Shards(tmp_path)
    saved, memory = count_saved_zeros(tmp_path, layout, model), count_zeros(model, layout)
    owners = defaultdict(list)
    for name, zeros in saved.items():
        assert zeros.zeros == sum(int((shards.read(t) == 0).sum()) for t in zeros.tensors)
        assert zeros.zeros == memory[name].zeros and zeros.rows.equal(memory[name].rows)
        for tensor in zeros.tensors:
            owners[tensor].append(name)
    assert max(map(len, owners.values())) == 1
    at = "model.layers.1.block_sparse_moe.experts.3"
    assert owners[f"{at}.w1.weight"] == ["model.layers.1.mlp.experts.gate_up_proj.3"]
    assert owners[f"{at}.w2.weight"] == ["model.layers.1.mlp.experts.down_proj.3"]


def test_a_linear_that_the_files_lack_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", blocks=1)
    layout = with_zeros(model)
    pretrained.save(model, None, tmp_path)
    tensors = load_file(tmp_path / ONE)
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    save_file(tensors, tmp_path / ONE, metadata={"format": "pt"})
    with pytest.raises(NeuroalError, match=f"linear '{name}' is not, or not wholly, in the saved"):
        count_saved_zeros(tmp_path, layout, model)

"""What a run is said to take of memory, against what it took: the peak of a process of its own."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuroal.testing import tiny_tokenizer

PROGRAM = Path(__file__).parents[1] / "programs/peak.py"
BASE = {"max_position_embeddings": 512, "num_attention_heads": 8, "num_hidden_layers": 6}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # A structure of some 150 MiB, a method, and how it is run.
    "llama": (
        {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, **BASE},
        {"top_up": "uniform", "samples": 32},
        {},
    ),
    "opt": (
        {"vocab_size": 32000, "hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512}
        | {"max_position_embeddings": 512, "num_attention_heads": 8, "num_hidden_layers": 6},
        {"top_up": "neuroal-block", "samples": 32, "dtype": "bfloat16"},
        {},
    ),
    "gpt2": (
        {"vocab_size": 32000, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 512},
        {"top_up": "uniform", "pruner": "magnitude"},
        {},
    ),
    "gemma3_text": (  # a large vocabulary, and logits
        {"vocab_size": 100_000, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
        | {"num_key_value_heads": 1, **BASE},
        {"alignment": "output_kl", "top_up": "neuroal-block", "samples": 4, "search_samples": 4},
        {},
    ),
    "mixtral": (
        {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, **BASE}
        | {"num_local_experts": 4, "num_hidden_layers": 3},
        {"pruner": "sparsegpt", "top_up": "uniform", "samples": 16},
        {"stream": True},
    ),
}
LONG = {"llama", "opt", "gemma3_text"}  # for `make test-full`
LAMBDAS = {"linear_schedule": {"lambdas": [0.05, 0.1, 0.2]}}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux counts it")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.matrix) if x in LONG else x for x in CASES]
)
def test_the_estimate_is_near_the_peak(
    name: str, tmp_path: Path, run_process: Callable[..., Any]
) -> None:
    sizes, method, how = CASES[name]
    if how:
        pytest.importorskip("transformers.conversion_mapping")
    save(name, sizes, tmp_path / "model")
    rows = torch.randint(90, (int(method.get("samples", 8)), 256))
    lines = (json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows)
    (tmp_path / "windows.jsonl").write_text("".join(lines))
    recipe = {"model": str(tmp_path / "model"), "calibration": str(tmp_path / "windows.jsonl")}
    recipe |= {"sparsity": 0.5, "device": "cpu", "length": 256, **method}
    if method["top_up"] != "uniform":
        recipe["options"] = LAMBDAS
    given = {"recipe": recipe, "out": str(tmp_path / "out"), "how": how}
    # Linux counts the memory of whoever starts a process as the process's own: a shell is small.
    command = ["sh", "-c", '"$0" "$1"; exit $?', sys.executable, PROGRAM]
    # Bits do not matter here, and attention in bfloat16 wants every vector that the processor has.
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    done = run_process(command, input=json.dumps(given), env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    ratio = said["used"] / said["estimated"]
    assert 1 / 1.3 <= ratio <= 1.3, said


def save(name: str, sizes: dict[str, Any], folder: Path) -> None:
    """Write a model of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)

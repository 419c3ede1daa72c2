"""The layouts of families that differ in structure, each looked at by eye and kept as a file.

`python -m tests.layout.test_golden` writes the files again, to be read before they are committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neuroal.cli.layout_tables import layout_tables
from neuroal.layout import find

pytest.importorskip("transformers.conversion_mapping", reason="the files are of transformers 5")

GOLDEN = Path(__file__).parent / "golden"
SMALL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0}
WIDTHS: dict[str, Any] = SMALL | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = WIDTHS | {"num_experts_per_tok": 2}
DEEPSEEK = {
    "num_hidden_layers": 3, "num_key_value_heads": 4, "first_k_dense_replace": 1,
    "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": WIDTHS,
    "gemma2": WIDTHS,
    "qwen3": WIDTHS,
    "phi3": WIDTHS,
    "falcon": SMALL | FALCON,
    "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mixtral": MOE | {"num_local_experts": 4},
    "qwen3_moe": MOE | {"num_experts": 4, "moe_intermediate_size": 24},
    "deepseek_v3": MOE | DEEPSEEK,
    "mamba2": SMALL
    | {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16},
    "jamba": MOE
    | {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 4, "expert_layer_offset": 3, "num_experts": 4,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
}  # fmt: skip


def layout_of(name: str) -> str:
    """Return the tables of a model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **CONFIGS[name])
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return "\n\n".join(layout_tables(find(model.eval()))) + "\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_layout(name: str) -> None:
    assert layout_of(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    for name in CONFIGS:
        (GOLDEN / f"{name}.txt").write_text(layout_of(name), encoding="utf-8")

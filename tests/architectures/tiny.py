"""Tiny random models of every causal-LM architecture, from the defaults of its configuration.

A configuration class says by its field names what a number is: a width, a count of heads, a rank.
`tiny_config` shrinks the defaults by name, so that a class nobody has looked at usually works;
`EXCEPTIONS` holds what a name cannot tell.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
CONTEXT = 64
MOST_LAYERS = 8
HIDDEN, HEADS, HEAD = 32, 4, 8

# The first expression that matches a field's whole name decides its value.
RULES: tuple[tuple[str, int], ...] = (
    (r"(\w*_)?vocab_size(_per_layer_input)?|unpadded_vocab_size|\w+_vocab_size", VOCABULARY),
    (r"(image|audio|video|vision|bo|eo)\w*_(token_id|token_index|index)", VOCABULARY - 2),
    (r"\w*(token_id|_index)", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", CONTEXT),
    (r"max_(source|target)_positions|context_length|original_max_position_embeddings", CONTEXT),
    (r"(\w*_)?sliding_window(_size)?|attention_(window|chunk)_size|window_size", 6),
    (r"local_attention|keep_window_size|local_attention_window_len", 6),
    (r"hidden_size_per_layer_input", HEAD),
    (r"\w*(hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_(size|dim))", HIDDEN),
    (
        r"(word_embed_proj|embed|adapter_in|adapter_out)_dim|adapter_input_size|lru_width|attention_hidden_size",
        HIDDEN,
    ),
    (r"\w*intermediate_size(_mlp)?|(\w*_)?ffn_dim|ffn_hidden_size|expert_ffn_hidden_size", 48),
    (r"d_ff|dff|dim_ff|d_inner|mlp_dim|feed_forward_size", 48),
    (r"(\w*_)?(key_value_heads|kv_heads|kv_n_heads)|num_query_groups", 2),
    (r"(\w*_)?(attention_heads|n_heads|num_heads|n_head|num_(key|value)_heads)", HEADS),
    (r"(\w*_)?(rope_head_dim|rotary_dim|d_rel)", 4),
    (r"(\w*_)?(head_dim|d_head|dim_head|d_kv|kv_channels|head_size)", HEAD),
    (r"(\w*_)?(lora_rank|dt_rank|time_step_rank|laurel_rank|lowrank|norm_rank|adapter_rank)", 4),
    (r"(\w*_)?(state_size|d_state)|mamba_d_head|mamba_headdim", HEAD),
    (r"(\w*_)?mamba_(n|num)_heads", 8),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"(\w*_)?chunk_size|\w*chunk_length|block_size", 8),
    (r"(num|n_routed|num_local|moe_num)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|num_expert_group|topk_group|o_groups|n_groups|mamba_n_?groups", 1),
    (r"(first_k_dense_replace|num_dense_layers)", 1),
    (r"(index_topk|index_topk_blocks)", 4),
)
LAYER_FIELDS = (
    r"(num_hidden_layers|n_layers?|num_layers|num_blocks|num_layers_per_stack|depth"
    r"|(encoder|decoder)_layers|num_(encoder|decoder)_layers)"
)

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
_SHARED_KEYS = {"layer_types": 2 * _LOCAL_GLOBAL, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
_HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]

# What names do not tell, by model type: sizes that have to fit one another, what a default leaves
# out, and features that the defaults switch off (layers that share keys and values).
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "layer_types": _LOCAL_GLOBAL,
        "rope_parameters": dict.fromkeys(_LOCAL_GLOBAL, _ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _EXPERTS,
    "dots3_note_text": {
        "layer_types": ["indexed_attention", *_LOCAL_GLOBAL[:1], "indexed_attention"],
        "num_hidden_layers": 3,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 4,
        "swa_kv_lora_rank": 4,
        "swa_head_dim": HEAD,
        "swa_qk_nope_head_dim": 4,
        "swa_v_head_dim": HEAD,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID, "num_hidden_layers": 5},
    "zamba2": {"layers_block_type": _HYBRID, "num_hidden_layers": 5},
}


def architectures() -> dict[str, str]:
    """Return the class name of every causal-LM architecture by its model type."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shard(names: list[str], part: str) -> list[str]:
    """Return the part "2/4" of names: the second, sixth, ... of them."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard '{part}' is not such as 1/4")
    return names[int(match[1]) - 1 :: int(match[2])]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the smallest configuration of an architecture that still has all its structure."""
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = kind()
    declared = {field.name: _default(field) for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = _shrunk(type(part))
    layers = _layers(default)
    for name, value in declared.items():
        if isinstance(value, bool) or name in values:
            continue
        if isinstance(value, int) and value > 0:
            values[name] = layers if re.fullmatch(LAYER_FIELDS, name) else _rule(name, value)
            if name == "num_key_value_heads" and value == declared.get("num_attention_heads"):
                values[name] = HEADS
        elif isinstance(value, (list, tuple)) and len(value) == _depth(default):
            values[name] = list(value[:layers])
        elif isinstance(value, (list, tuple)) and name.endswith("_token_id"):
            values[name] = 1
        elif name == "initializer_range":
            values[name] = 0.2  # large enough that blocks change what passes them
    return kind(**{**values, **EXCEPTIONS.get(kind.model_type, {})})


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _rule(name: str, value: int) -> int:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(small, value)
    return value


def _depth(config: PreTrainedConfig) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _layers(config: PreTrainedConfig) -> int:
    """Return how many layers it takes to see every kind of layer once; at least two."""
    depth = _depth(config)
    needed = 2
    for name in dir(config):
        if "layer" in name or "block" in name:
            try:
                kinds = getattr(config, name)
            except (AttributeError, TypeError, NotImplementedError):
                continue
            if isinstance(kinds, (list, tuple)) and len(kinds) == depth:
                if len(set(map(str, kinds))) < len(kinds):  # not the layers' own numbers
                    needed = max(needed, *(kinds.index(k) + 1 for k in set(kinds)))
    return min(needed, MOST_LAYERS)


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """Return a tiny model of random weights, float32, in evaluation mode.

    Matrices that start as zeros (gates, residual branches) get random values as well, so that no
    weight is zero before pruning.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        for p in model.parameters():
            if p.dim() >= 2 and not p.any():
                p.normal_(std=0.2)
    return model.eval()

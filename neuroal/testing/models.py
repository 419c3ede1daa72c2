"""Tiny models and hand-made data for the tests of plugins, a stranger's as well as neuroal's own.

Everything is made from a seed, in memory and on the CPU, in well under a second once transformers
is imported.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuroal.errors import UsageError, nearest
from neuroal.layout import Block, Layout, Linear
from neuroal.layout.parts import Place
from neuroal.types import Accumulator
from neuroal.walk.statistics import Collector, Statistics, resolve

VOCABULARY = 97
CONTEXT = 64
END_TOKEN = 1
STRUCTURES = ("llama", "mistral", "phi", "opt")


def tiny_model(structure: str, seed: int = 0, *, blocks: int = 3) -> nn.Module:
    """Return a small causal language model of random weights, float32, in evaluation mode.

    Hidden size 32, MLP size 48, four heads, vocabulary 97, context 64. Weights are large enough
    that activations differ between inputs and blocks; norms and biases are not their usual ones and
    zeros.

    Args:
        structure: "llama"; "mistral", with two key/value heads for four query heads; "phi", with
            attention and MLP side by side; or "opt", with biases, learnt positions and embeddings
            tied to the head.
        seed: Seed of the weights; torch's global generator is left alone.
        blocks: Number of decoder blocks.

    Raises:
        UsageError: There is no such structure.
    """
    if structure not in STRUCTURES:
        raise UsageError(f"structure '{structure}' is not known: {nearest(structure, STRUCTURES)}")
    with torch.random.fork_rng(devices=[]):
        model = _untrained(structure, blocks)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if "embed" in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * (1.5 / math.sqrt(parameter.shape[1])))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return model.eval()


def _untrained(structure: str, blocks: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": END_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
    }
    if structure == "opt":
        own = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    else:
        heads = 2 if structure == "mistral" else 4
        own = {"intermediate_size": 48, "num_key_value_heads": heads}
    config = AutoConfig.for_model(structure, **common, **own)
    model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def tiny_tokenizer() -> Any:
    """Return a tokenizer of the 97 tokens of `tiny_model`, a `PreTrainedTokenizerFast`.

    Every printable ASCII character is a token, after `<unk>` and `</s>`; other characters, line
    ends among them, are `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.digits + string.ascii_letters + string.punctuation + " "
    vocabulary = {token: i for i, token in enumerate(("<unk>", "</s>", *characters))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def windows(samples: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    """Return random calibration windows for `tiny_model`, int64 `(samples, length)`."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, length), generator=rng)


def linear(
    out_features: int = 4,
    in_features: int = 6,
    *,
    name: str = "model.layers.0.mlp.up_proj",
    block: int = 0,
    group: int = 0,
    paired: str | None = None,
    part: Literal["attention", "mlp"] = "mlp",
) -> Linear:
    """Return the description of one linear, as hooks are given it."""
    place = Place.whole(f"{name}.weight", in_features)
    return Linear(name, block, out_features, in_features, group, paired, part, place)


def layout(blocks: int = 2, shapes: Mapping[str, tuple[int, int]] | None = None) -> Layout:
    """Return a layout without a model: the same linears, run one after the other, in every block.

    Args:
        blocks: Number of blocks.
        shapes: `(out, in)` by the linear's name within the block, in execution order; `q`, `o`,
            `up` and `down` of width 4 and 6 by default.

    Returns:
        Blocks called `blocks.0`, `blocks.1`, ...; every linear a group of its own, paired with the
        next one where its rows are the next one's inputs, the first in a block in "attention".
    """
    shapes = shapes or {"q": (4, 4), "o": (4, 4), "up": (6, 4), "down": (4, 6)}
    places = [(b, k, key) for b in range(blocks) for k, key in enumerate(shapes)]
    names = [f"blocks.{b}.{key}" for b, _, key in places]
    linears: list[list[Linear]] = [[] for _ in range(blocks)]
    for i, (b, k, key) in enumerate(places):
        rows, columns = shapes[key]
        follows = i + 1 < len(places) and shapes[places[i + 1][2]][1] == rows
        paired = names[i + 1] if follows else None
        part: Literal["attention", "mlp"] = "mlp" if k else "attention"
        place = Place.whole(f"{names[i]}.weight", columns)
        linears[b].append(Linear(names[i], b, rows, columns, k, paired, part, place))
    return Layout(tuple(Block(b, f"blocks.{b}", tuple(x)) for b, x in enumerate(linears)))


def statistics(
    values: Mapping[str, Tensor | Sequence[Any]] | None = None,
    /,
    **more: Tensor | Sequence[Any],
) -> Statistics:
    """Return statistics of values, which become float32: `statistics(input_norm=[3, 4])`."""
    everything = {**(values or {}), **more}
    return Statistics({name: torch.as_tensor(v).float() for name, v in everything.items()})


def collect(x: Tensor, *required: str | Accumulator, dense: Tensor | None = None) -> Statistics:
    """Return the statistics that a run collects from inputs `x (windows, tokens, in)`.

    `required` is what a plugin's `required_statistics` may name; `dense`, for accumulators that
    compare, is the dense run's inputs of the same shape.

    Raises:
        UsageError: A name is not known.
    """
    collector = Collector(resolve(required), x.shape[-1])
    collector.update(x, dense)
    return collector.statistics()

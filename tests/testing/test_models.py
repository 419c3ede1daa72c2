"""What neuroal.testing hands out is what it says."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from neuroal import UsageError
from neuroal.testing import (
    CONTEXT,
    STRUCTURES,
    VOCABULARY,
    layout,
    linear,
    statistics,
    tiny_model,
    tiny_tokenizer,
    windows,
)

each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@each_structure
def test_a_model_is_its_seed(structure: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = tiny_model(structure), tiny_model(structure), tiny_model(structure, 1)
    assert torch.rand(3).equal(expected)  # torch's own generator is left alone
    for (name, a), b, c in zip(
        one.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert a.equal(b) and not a.equal(c), name


@each_structure
def test_a_model_is_not_trivial(structure: str) -> None:
    model = tiny_model(structure)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.std() > 0.01, name
    hidden: list[torch.Tensor] = []
    blocks: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        block.register_forward_hook(
            lambda _, __, out: hidden.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    ids = windows(2, CONTEXT)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (2, CONTEXT, VOCABULARY)
    assert len(hidden) == 3
    for before, after in pairwise(hidden):
        # Every block does something, and treats tokens and inputs differently.
        assert (after - before).std() > 0.1 * before.std()
        norms = after.square().mean(dim=(0, 1)).sqrt()
        assert norms.std() > 0.1 * norms.mean()


def test_number_of_blocks() -> None:
    model: Any = tiny_model("mistral", blocks=2)
    assert len(model.model.layers) == 2
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_an_unknown_structure() -> None:
    with pytest.raises(UsageError, match="structure 'lama' is not known: did you mean 'llama'"):
        tiny_model("lama")


def test_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY
    text = "Hello, World! 0~ {a}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and max(ids) < VOCABULARY and min(ids) > 1
    assert tokenizer.decode(ids) == text
    assert tokenizer("é\n")["input_ids"] == [0, 0]
    assert tokenizer.eos_token_id == 1


def test_windows() -> None:
    assert windows().shape == (4, 16) and windows().dtype == torch.int64
    assert windows(2, 3, 1).equal(windows(2, 3, 1)) and not windows(2, 3).equal(windows(2, 3, 1))
    assert int(windows(100).min()) >= 0 and int(windows(100).max()) < VOCABULARY


def test_layout_and_linear() -> None:
    found = layout(2, {"up": (6, 4), "down": (4, 6)})
    assert [b.name for b in found.blocks] == ["blocks.0", "blocks.1"]
    pairs = [(x.name, x.paired, x.group, x.part) for x in found.linears.values()]
    assert pairs == [
        ("blocks.0.up", "blocks.0.down", 0, "attention"),
        ("blocks.0.down", "blocks.1.up", 1, "mlp"),
        ("blocks.1.up", "blocks.1.down", 0, "attention"),
        ("blocks.1.down", None, 1, "mlp"),
    ]
    assert layout(1, {"a": (3, 4), "b": (5, 4)}).linears["blocks.0.a"].paired is None
    assert (linear(2, 3).out_features, linear(2, 3).in_features) == (2, 3)


def test_statistics() -> None:
    made = statistics(input_norm=[3, 4])
    assert made.input_norm.tolist() == [3.0, 4.0] and made.input_norm.dtype == torch.float32

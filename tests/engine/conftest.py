"""Tiny models of four structures, in memory and on disk, and what every engine test asks of them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from neuroal import Recipe

FAMILIES = ("llama", "mistral", "phi", "opt")
VOCABULARY, BLOCKS, WIDTH, CONTEXT = 96, 3, 16, 64
WINDOWS, SEARCH, LENGTH = 6, 2, 16
LAMBDAS = {"linear_schedule": {"lambdas": [0.05, 0.1]}, "neuroal": {"lambdas": [0.0, 0.1]}}

MakeModel = Callable[..., nn.Module]
Tensors = dict[str, Tensor]


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model of one structure; mistral has grouped key/value heads, opt tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, PhiConfig

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,  # large enough for ratios to matter
    }
    if family == "llama":
        config: Any = LlamaConfig(intermediate_size=24, **common)
    elif family == "mistral":
        config = MistralConfig(intermediate_size=24, num_key_value_heads=2, **common)
    elif family == "phi":
        config = PhiConfig(intermediate_size=24, **common)
    else:
        common["init_std"] = common.pop("initializer_range")
        config = OPTConfig(ffn_dim=24, word_embed_proj_dim=WIDTH, **common)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    assert isinstance(model, nn.Module)
    return model


def save_model(model: nn.Module, folder: Path) -> Path:
    """The model as a checkpoint, with a tokenizer that knows a word per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)  # type: ignore[operator]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a folder's checkpoint, read without neuroal."""
    result: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        result |= load_file(file)
    return result


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the four structures."""
    return str(request.param)


@pytest.fixture(scope="session", name="make_model")
def _make_model() -> MakeModel:
    return make_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A saved model per structure."""
    root = tmp_path_factory.mktemp("models")
    return {f: save_model(make_model(f), root / f) for f in FAMILIES}


@pytest.fixture(scope="session")
def save() -> Callable[[nn.Module, Path], Path]:
    """Saves a model with a tokenizer."""
    return save_model


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], Tensors]:
    """Reads the tensors of a checkpoint."""
    return tensors_of


@pytest.fixture(scope="session")
def windows() -> Tensor:
    """Calibration token ids."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=rng)


@pytest.fixture(scope="session")
def windows_file(tmp_path_factory: pytest.TempPathFactory, windows: Tensor) -> Path:
    """The same token ids as rows of a file."""
    file = tmp_path_factory.mktemp("data") / "windows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": w.tolist()}) + "\n" for w in windows))
    return file


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Wanda with NeuroAL on top, both grids cut to two candidates; in memory it takes `windows`."""
    return Recipe(
        sparsity=0.6, samples=WINDOWS, search_samples=SEARCH, options=LAMBDAS, device="cpu"
    )


@pytest.fixture(scope="session")
def recipe_by_path(recipe: Recipe, windows_file: Path) -> Recipe:
    """The same on the windows' file."""
    return dataclasses.replace(recipe, calibration=str(windows_file))

"""Tiny models of every structure, in memory and on disk, and a recipe that takes a blink."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from neuroal import Recipe
from neuroal.testing import STRUCTURES, tiny_model, tiny_tokenizer
from neuroal.testing import windows as random_windows

SAMPLES, SEARCH_SAMPLES, LENGTH = 6, 2, 16

Tensors = dict[str, Tensor]
State = dict[str, str]


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> str:
    """Each structure in turn; mistral has fewer key/value heads, opt tied embeddings."""
    return str(request.param)


@pytest.fixture(scope="session")
def save() -> Callable[[nn.Module, Path], Path]:
    """Writes a model and the tiny tokenizer as a checkpoint."""

    def write(model: Any, folder: Path) -> Path:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, save: Callable[[nn.Module, Path], Path]
) -> Mapping[str, Path]:
    """The folder of a saved model per structure: what `tiny_model` makes."""
    root = tmp_path_factory.mktemp("models")
    return {s: save(tiny_model(s), root / s) for s in STRUCTURES}


@pytest.fixture(scope="session")
def windows() -> Tensor:
    """Calibration token ids for a model in memory."""
    return random_windows(SAMPLES, LENGTH)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Wanda with NeuroAL on top, both grids cut to two candidates; wants `windows`."""
    return Recipe(
        sparsity=0.6,
        samples=SAMPLES,
        search_samples=SEARCH_SAMPLES,
        options={"linear_schedule": {"lambdas": [0.05, 0.1]}, "neuroal": {"lambdas": [0.0, 0.1]}},
        device="cpu",
    )


@pytest.fixture(scope="session")
def from_file(recipe: Recipe, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The same recipe, reading the same windows from a file, for models given by path."""
    file = tmp_path_factory.mktemp("data") / "windows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": w.tolist()}) + "\n" for w in windows))
    return dataclasses.replace(recipe, calibration=str(file))


@pytest.fixture(scope="session")
def read() -> Callable[[Path], Tensors]:
    """Reads every tensor of a checkpoint, without neuroal."""

    def tensors(folder: Path) -> Tensors:
        files = sorted(folder.glob("model*.safetensors"))
        return {name: t for file in files for name, t in load_file(file).items()}

    return tensors


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], State]:
    """The SHA-256 of every safetensors file in a folder, by name."""

    def sha256(folder: Path) -> State:
        files = sorted(folder.glob("*.safetensors"))
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    return sha256


@pytest.fixture(scope="session")
def linears() -> Callable[[nn.Module], dict[str, Tensor]]:
    """The weight of every `nn.Linear` in the decoder blocks by full name, without neuroal."""

    def weights(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: module.weight.detach()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        }

    return weights


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[], State]:
    """Everything in the test's folder: path to SHA-256, or to "" for a folder."""

    def state() -> State:
        return {
            str(p.relative_to(tmp_path)): (
                hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
            )
            for p in sorted(tmp_path.rglob("*"))
        }

    return state


@pytest.fixture(scope="session")
def weights_of() -> Callable[[nn.Module], Tensors]:
    """A copy of everything a model holds."""

    def copies(model: nn.Module) -> Tensors:
        return {name: t.detach().clone() for name, t in model.state_dict().items()}

    return copies


@pytest.fixture(scope="session")
def same() -> Callable[[Tensors, Tensors], bool]:
    """Whether two sets of tensors are the same to the bit, names, shapes and dtypes included."""

    def equal(a: Tensors, b: Tensors) -> bool:
        return a.keys() == b.keys() and all(
            a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
        )

    return equal

"""Every architecture comes to what `docs/models.md` says of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers

from .check import check
from .page import label, read
from .tiny import architectures, shard

# One of each structure; the rest is for `make test-full`.
FEW = (
    "gpt2",  # transposed weights
    "gpt_neox",  # fused q, k and v; attention and MLP side by side
    "gemma3_text",  # local and global attention
    "phi3",  # fused gate and up
    "qwen3_moe",  # experts stacked in one parameter
    "deepseek_v3",  # low-rank attention, shared experts
    "mamba2",
    "zamba",  # blocks that share weights
    "gemma3n_text",  # blocks that share keys and values
)
REST = [name for name in architectures() if name not in FEW]


@pytest.fixture(scope="module")
def documented(project: Path) -> dict[str, str]:
    version, labels = read((project / "docs" / "models.md").read_text("utf-8"))
    if version != transformers.__version__:
        pytest.skip(f"docs/models.md is about transformers {version}")
    return labels


def is_as_documented(model_type: str, documented: dict[str, str]) -> None:
    outcome = check(model_type)
    assert label(outcome) == documented.get(model_type, "supported"), outcome.reason


@pytest.mark.parametrize("model_type", FEW)
def test_one_of_each_structure(model_type: str, documented: dict[str, str]) -> None:
    is_as_documented(model_type, documented)


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", shard(REST, os.environ.get("NEUROAL_SHARD", "1/1")))
def test_every_architecture(model_type: str, documented: dict[str, str]) -> None:
    is_as_documented(model_type, documented)


def test_the_table_has_every_architecture(documented: dict[str, str]) -> None:
    assert documented.keys() == architectures().keys()

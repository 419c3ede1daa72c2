"""A finished run of a small model, as an exporter is given it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.layout import Layout, find, matrices
from neuroal.model import pretrained
from neuroal.model.files import MARKER
from neuroal.recipe import Recipe
from neuroal.run.report import Report, environment
from neuroal.testing import models
from neuroal.types import Accumulator, LinearToExport

_SIZE = 64  # rows and columns of every linear, which kernels for 2:4 take
_ROWS = ("min", "mean", "max")


@dataclass(frozen=True, eq=False)
class TinyRun:
    """A `RunToExport` in a folder of its own.

    Attributes:
        folder: An ordinary checkpoint with its `neuroal.json`.
        report: Content of that.
        model: The pruned model.
        dense: The dense one.
        required: What statistics are collected of.
    """

    folder: Path
    report: Mapping[str, Any]
    model: nn.Module
    dense: nn.Module
    required: tuple[str | Accumulator, ...]

    @property
    def layout(self) -> Layout:
        """Return the layout of the model."""
        return find(self.model)

    def copy(self, folder: Path) -> None:
        """Copy the run into a folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def linears(self) -> Iterator[LinearToExport]:
        """Yield the pruned linears in order, with statistics of made-up inputs."""
        for k, x in enumerate(self.layout.linears.values()):
            inputs = torch.randn(2, 40, _SIZE, generator=torch.Generator().manual_seed(k))
            yield LinearToExport(
                linear=x,
                weight=matrices.weight(x, self.model).clone(),
                dense=matrices.weight(x, self.dense).clone(),
                statistics=models.collect(inputs * (1 + torch.arange(_SIZE) % 5), *self.required),
            )


def finished_run(
    folder: Path, required: Iterable[str | Accumulator] = (), *, pattern: str = "2:4"
) -> TinyRun:
    """Write a small Llama of two blocks, pruned by magnitude, as a run leaves it.

    Every linear has 64 rows and 64 columns.

    Args:
        folder: To write; not there yet.
        required: Statistics that an exporter reads, of made-up inputs.
        pattern: "2:4", or "unstructured": the lower half of every row's weights is pruned.
    """
    dense, model = _llama(), _llama()
    with torch.no_grad():
        for x in find(model).linears.values():
            weight = matrices.weight(x, model)
            groups = weight.view(-1, 4) if pattern == "2:4" else weight
            lowest = groups.abs().argsort(dim=1)[:, : groups.shape[1] // 2]
            groups.scatter_(1, lowest, 0)
    pretrained.save(model, models.tiny_tokenizer(), folder)
    report = _report(model, pattern)
    (folder / MARKER).write_text(json.dumps(report), encoding="utf-8")
    return TinyRun(folder, report, model, dense, tuple(required))


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _llama() -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=models.VOCABULARY,
        hidden_size=_SIZE,
        intermediate_size=_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=models.CONTEXT,
        pad_token_id=models.END_TOKEN,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def _report(model: nn.Module, pattern: str) -> dict[str, Any]:
    layout = find(model)
    zeros = {n: _zeros(matrices.weight(x, model)) for n, x in layout.linears.items()}
    shares = {n: zeros[n] / x.weights for n, x in layout.linears.items()}
    recipe = Recipe(pruner="magnitude", top_up="uniform", pattern=pattern)
    sparsity = sum(zeros.values()) / layout.weights
    report = Report(
        recipe=recipe.to_json(),
        recipe_sha256=recipe.digest(),
        environment=environment(model),
        model={"name": "some/llama", "sha256": None},
        plugins=[],
        data=None,
        sparsity={"wanted": 0.5} | dict.fromkeys(("achieved", "over_pruned", "over_all"), sparsity),
        blocks=[{"name": x.name} for x in layout.blocks],
        linears={
            n: {"wanted": 0.5, "achieved": share, "rows": dict.fromkeys(_ROWS, share)}
            for n, share in shares.items()
        },
        timings={"prune": 0.0},
        counts={
            "block_runs": 0,
            "linears": len(zeros),
            "weights": layout.weights,
            "pruned": sum(zeros.values()),
            "all_linears": len(zeros),
            "all_weights": layout.weights,
        },
    )
    return report.to_json()


def _zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())

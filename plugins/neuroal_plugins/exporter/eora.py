"""A low-rank companion of a pruned model, as an adapter of peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neuroal import ExporterTraits, Linear, RunToExport, UsageError, hookimpl, option


@dataclass(frozen=True, eq=False)
class Eora:
    """B A closest to what pruning took, weighed by the inputs (Liu et al. 2024, arXiv:2410.21271).

    For every pruned linear, with D = W − Ŵ and the inputs' Gram matrix H = Q Λ Qᵀ of the pruned
    model: S = Q Λ^½, U Σ Vᵀ the first `rank` terms of the singular value decomposition of D S,
    B = U Σ^½ and A = Σ^½ Vᵀ Λ^−½ Qᵀ. No B A of that rank has a smaller ‖(D − B A) S‖, the error of
    the linear's outputs on the calibration windows. Nothing is trained.

    What comes out is a LoRA adapter for the pruned model: `PeftModel.from_pretrained(model, DIR)`.
    Its parameters are dense, and cost a part of what the zeros save: the result says how much.
    """

    rank: int = option(64, "of every B A; smaller matrices get what they can have")
    floor: float = option(1e-6, "eigenvalues Λ are at least this times the largest, in (0, 1)")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} is below 1")
        if not 0 < self.floor < 1:
            raise ValueError(f"floor={self.floor} is not in (0, 1)")

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        """Return what the inputs are weighed by: their Gram matrix."""
        return frozenset({"gram"})

    @hookimpl
    def describe(self) -> ExporterTraits:
        """Say that the dense weights are read."""
        return ExporterTraits(reads_dense=True)

    @hookimpl
    def export_run(self, run: RunToExport, folder: Path) -> Mapping[str, Any]:
        """Write the adapter, and say what of the error it takes back and what it costs."""
        tensors: dict[str, Tensor] = {}
        names: list[str] = []
        before = after = 0.0
        for x in run.linears():
            assert x.dense is not None
            if not _is_module(x.linear):
                raise UsageError(
                    f"'{x.linear.name}' is a part of a parameter, to which no LoRA can be added"
                )
            lost, gram = x.dense.double() - x.weight.double(), x.statistics.gram.double()
            a, b, error, rest = companion(lost, gram, self.rank, self.floor)
            names.append(x.linear.name)
            before, after = before + error, after + rest
            for which, factor in (("A", a), ("B", b)):
                key = f"base_model.model.{x.linear.name}.lora_{which}.weight"
                tensors[key] = factor.to(x.weight.dtype).cpu().contiguous()
        if not names:
            raise UsageError("the run has no pruned linear")
        config = _config(self.rank, names, str(run.folder.resolve()))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        return self._result(run.report, tensors, before, after)

    def _result(
        self, report: Mapping[str, Any], tensors: Mapping[str, Tensor], before: float, after: float
    ) -> dict[str, Any]:
        counts = report["counts"]
        parameters = sum(x.numel() for x in tensors.values())
        saved = counts["pruned"] - parameters
        said = {
            "rank": self.rank,
            "output_error_taken_back": 1 - after / before if before else 0.0,
            "parameters": parameters,
            "bytes": sum(x.numel() * x.element_size() for x in tensors.values()),
            "of_the_pruned_weights": parameters / counts["pruned"],
            "sparsity": counts["pruned"] / counts["weights"],
            "sparsity_left": saved / counts["weights"],
        }
        if saved < 0:
            most = (self.rank * counts["pruned"] - 1) // parameters
            smaller = f"a rank of at most {most} saves" if most > 0 else "no rank saves"
            said["note"] = f"the adapter has more parameters than were pruned: {smaller}"
        return said


def companion(
    lost: Tensor, gram: Tensor, rank: int, floor: float
) -> tuple[Tensor, Tensor, float, float]:
    """Return the factors A and B of the B A that comes closest to D under H.

    Args:
        lost: D = W − Ŵ, float64 `(out, in)`.
        gram: H, float64 `(in, in)`.
        rank: Of B A; what the matrix cannot have is zero.
        floor: Eigenvalues of H are at least this times the largest.

    Returns:
        A `(rank, in)` and B `(out, rank)`, float64, and ‖D S‖² before and after, squared Frobenius
        norms.
    """
    values, q = torch.linalg.eigh(gram)
    top = float(values[-1])
    if top > 0:
        root = values.clamp(min=floor * top).sqrt()  # (in,)
    else:  # inputs that are all zero: every direction counts alike
        root = torch.ones_like(values)
    u, sigma, vt = torch.linalg.svd(lost @ (q * root), full_matrices=False)
    kept = min(rank, len(sigma))
    a, b = lost.new_zeros(rank, len(values)), lost.new_zeros(len(lost), rank)
    b[:, :kept] = u[:, :kept] * sigma[:kept].sqrt()
    a[:kept] = sigma[:kept].sqrt()[:, None] * vt[:kept] / root @ q.t()
    return a, b, float(sigma.square().sum()), float(sigma[kept:].square().sum())


def _is_module(linear: Linear) -> bool:
    """Return whether a linear is all of a module's weight, also of one that is transposed."""
    place = linear.place
    return place.parameter == f"{linear.name}.weight" and place.offset == 0


def _config(rank: int, names: list[str], model: str) -> dict[str, Any]:
    """Return the configuration of an adapter as peft reads it; B A is added as it is."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": names,
        "inference_mode": True,
    }

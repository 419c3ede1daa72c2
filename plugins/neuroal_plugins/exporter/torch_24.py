"""2:4 sparsity for torch's semi-structured kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal import Linear, RunToExport, UsageError, hookimpl

ROWS, COLUMNS = 32, 64  # what torch's kernels divide matrices by, in half precision
LINEARS, LOADER = "linears_24.json", "load_24.py"
_LOADER = '''"""Loads this checkpoint with its 2:4 linears in the form of torch's sparse kernels."""

import json
from pathlib import Path

import torch
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent


def load(device="cuda", dtype=torch.float16):
    """Return the model; its inputs are in `dtype`, torch.float16 or torch.bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=dtype).to(device).eval()
    for name in json.loads((HERE / "linears_24.json").read_text()):
        linear = model.get_submodule(name)
        sparse = to_sparse_semi_structured(linear.weight.detach())
        linear.weight = torch.nn.Parameter(sparse, requires_grad=False)
    return model
'''


@dataclass(frozen=True, eq=False)
class Torch24:
    """The checkpoint, checked group by group, with a loader for torch's 2:4 kernels.

    `to_sparse_semi_structured` (Mishra et al. 2021, arXiv:2104.08378) stores two of every four
    weights and their places, and multiplies on the sparse tensor cores of NVIDIA GPUs since
    Ampere. It does not check what it is given: a group of four with three weights would lose one.
    Here every group of every pruned linear is looked at, and one that has more than two weights
    ends the export. Linears whose rows 32 or whose columns 64 does not divide have no kernel and
    stay as they are, as do slices of larger parameters.
    """

    @hookimpl
    def export_run(self, run: RunToExport, folder: Path) -> Mapping[str, Any]:
        """Write the checkpoint, the names of its 2:4 linears, and `load_24.py`."""
        fitting: list[str] = []
        others: list[str] = []
        for x in run.linears():
            _check_groups(x.linear, x.weight)
            (fitting if _fits(x.linear) else others).append(x.linear.name)
        if not fitting:
            raise UsageError(f"no pruned linear has rows by {ROWS} and columns by {COLUMNS}")
        run.copy(folder)
        (folder / LINEARS).write_text(json.dumps(fitting, indent=1) + "\n", encoding="utf-8")
        (folder / LOADER).write_text(_LOADER, encoding="utf-8")
        layout = run.layout
        weights = sum(layout.linears[name].weights for name in fitting)
        return {
            "loader": f"{LOADER}: load(device, dtype)",
            "linears": len(fitting),
            "weights": weights,
            "linears_without_a_kernel": others,
            "linears_left_dense": len(layout.linears) - len(fitting) - len(others),
        }


def _check_groups(linear: Linear, weight: Any) -> None:
    """Refuse a weight `(out, in)` of which four consecutive inputs of a row keep more than two."""
    if linear.in_features % 4:
        raise UsageError(f"'{linear.name}' has {linear.in_features} columns, no groups of four")
    kept = (weight != 0).view(linear.out_features, -1, 4).sum(2)  # (out, in / 4)
    if int(kept.max()) > 2:
        row, group = divmod(int((kept > 2).flatten().int().argmax()), kept.shape[1])
        raise UsageError(
            f"'{linear.name}' is not 2:4: columns {4 * group} to {4 * group + 3} of row {row} keep "
            f"{int(kept[row, group])} weights: prune with --pattern 2:4, and --keep the others"
        )


def _fits(linear: Linear) -> bool:
    """Return whether torch has a kernel for a linear that is a module's whole weight."""
    place = linear.place
    whole = place.parameter == f"{linear.name}.weight" and not place.transposed
    return whole and linear.out_features % ROWS == 0 and linear.in_features % COLUMNS == 0

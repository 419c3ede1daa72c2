"""Allocations: the ratio of every linear, and of its rows or their importance; and their file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Layout, Linear
from neuroal.model.files import load_tensors
from neuroal.types import Importance

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FILE = "allocation.safetensors"
IMPORTANCE, INPUTS = ":importance", ":input_importance"
FURTHEST = 1e12  # factor between importance of two rows: float32 still orders scores of both


@dataclass(frozen=True, eq=False)
class Allocation:
    """Ratios per linear and, after a row step, per row.

    Attributes:
        ratios: Wanted ratio of every linear, in [0, 1].
        rows: float64 `(out,)` per linear; empty without a row step.
        importance: float64, of the linears whose rows compete for its ratio; empty without a row
            step that weighs rows.
    """

    ratios: Mapping[str, float]
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    importance: Mapping[str, Importance] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ratios: Mapping[str, float | Tensor],
        layout: Layout,
        importance: Mapping[str, Importance] | None = None,
        partial: bool = False,
    ) -> Allocation:
        """Return the allocation of a proposal's ratios, checked against the layout.

        Where it is `partial`, some linears may have none.

        Raises:
            NeuroalError: A linear is missing or unknown, a ratio is outside [0, 1], a row tensor
                has the wrong shape, or importance is not positive, finite and within `FURTHEST`.
        """
        linears = layout.linears
        wrong = ratios.keys() - linears.keys() if partial else linears.keys() ^ ratios.keys()
        if wrong:
            raise NeuroalError(f"allocation and model differ in linear '{min(wrong)}'")
        by_row = any(isinstance(r, Tensor) and r.dim() for r in ratios.values())
        means: dict[str, float] = {}
        rows: dict[str, Tensor] = {}
        for name, linear in linears.items():
            if name not in ratios:
                continue
            ratio = ratios[name]
            values = torch.as_tensor(ratio, dtype=torch.float64).detach().cpu()
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise NeuroalError(f"ratio of '{name}' is not in [0, 1]")
            if values.dim() and values.shape != (linear.out_features,):
                raise NeuroalError(
                    f"ratios of '{name}' have shape {tuple(values.shape)}, not "
                    f"({linear.out_features},)"
                )
            means[name] = float(values.mean())
            if by_row:
                rows[name] = values.expand(linear.out_features).clone()
        importance = importance or {}
        unknown = importance.keys() - ratios.keys()
        if unknown:
            raise NeuroalError(f"allocation and model differ in linear '{min(unknown)}'")
        checked = {name: _checked(linears[name], x) for name, x in importance.items()}
        if by_row and checked:
            raise NeuroalError("an allocation has ratios of rows or importance of rows, not both")
        return cls(means, rows, checked)


def _checked(linear: Linear, importance: Importance) -> Importance:
    """Return the importance of a linear's rows and inputs, checked, float64 on the CPU."""
    if not isinstance(importance, Importance):
        kind = type(importance).__name__
        raise NeuroalError(f"importance of '{linear.name}' is {kind}, not Importance(rows, inputs)")
    rows = _checked_values(f"'{linear.name}'", importance.rows, linear.out_features)
    if importance.inputs is None:
        return Importance(rows)
    whose = f"inputs of '{linear.name}'"
    return Importance(rows, _checked_values(whose, importance.inputs, linear.in_features))


def _checked_values(whose: str, tensor: Tensor, size: int) -> Tensor:
    """Return `(size,)` values of importance, checked, float64 on the CPU."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise NeuroalError(f"importance of {whose} is {kind}, not a floating tensor")
    values = tensor.detach().to("cpu", torch.float64, copy=True)
    if values.shape != (size,):
        raise NeuroalError(f"importance of {whose} has shape {tuple(values.shape)}, not ({size},)")
    problem = importance_problem(values)
    if problem is not None:
        raise NeuroalError(f"importance of {whose} {problem}")
    return values


def importance_problem(values: Tensor) -> str | None:
    """Return what is wrong with the importance of rows or inputs; None if it is valid.

    Args:
        values: Floating `(out,)` or `(in,)`, of one linear.
    """
    if not bool((values.isfinite() & (values > 0)).all()):
        return "is not positive and finite"
    least, most = float(values.min()), float(values.max())
    if most / FURTHEST > least:
        return f"is from {least:.3g} to {most:.3g}, further apart than a factor of {FURTHEST:g}"
    return None


def scaled_importance(importance: Importance | None) -> Importance | None:
    """Return importance, float32, divided by the power of two that brings the largest to [1/2, 1).

    Only proportions count; so divided, it makes no score or weight overflow or lose a bit. Rows of
    equal importance become ones, such inputs None; if both are equal, the result is None.

    Args:
        importance: float64, in which `importance_problem` finds nothing.
    """
    if importance is None:
        return None
    rows = _scaled(importance.rows)
    inputs = None if importance.inputs is None else _scaled(importance.inputs)
    if rows is None and inputs is None:
        return None
    return Importance(torch.ones(len(importance.rows)) if rows is None else rows, inputs)


def _scaled(values: Tensor) -> Tensor | None:
    if bool((values == values[0]).all()):
        return None
    exponent = math.frexp(float(values.max()))[1]
    return (values / math.ldexp(1, exponent - 1) / 2).float()


def to_bytes(allocation: Allocation, layout: Layout) -> bytes:
    """Return `allocation.safetensors`: float64 `(out,)` or `(1,)` ratios by linear.

    Importance of rows is under the linear's name and `:importance`, that of inputs under the name
    and `:input_importance`.
    """
    tensors = {
        name: allocation.rows[name]
        if name in allocation.rows
        else torch.tensor([allocation.ratios[name]], dtype=torch.float64)
        for name in layout.linears
    }
    for name, x in allocation.importance.items():
        tensors[f"{name}{IMPORTANCE}"] = x.rows
        if x.inputs is not None:
            tensors[f"{name}{INPUTS}"] = x.inputs
    return to_safetensors(tensors, metadata={"format": "neuroal allocation 1"})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Importance]]:
    """Return the ratios and the importance in an allocation's file, by linear name.

    Raises:
        NeuroalError: It cannot be read.
        UsageError: It holds anything but floating `(1,)` or `(out,)`, or has importance of inputs
            without that of the rows.
    """
    tensors = load_tensors(path)
    for name, x in tensors.items():
        if x.dtype not in _DTYPES or x.dim() != 1 or not x.numel():
            what = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            raise UsageError(
                f"'{path}' is no allocation: '{name}' is {what}, not floating (1,) or (out,)"
            )
    rows, inputs = _popped(tensors, IMPORTANCE), _popped(tensors, INPUTS)
    alone = inputs.keys() - rows.keys()
    if alone:
        raise UsageError(
            f"'{path}' is no allocation: '{min(alone)}' has importance of inputs alone"
        )
    return tensors, {name: Importance(x, inputs.get(name)) for name, x in rows.items()}


def _popped(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.endswith(suffix)]
    return {name.removesuffix(suffix): tensors.pop(name) for name in names}


def read(path: Path, layout: Layout) -> Allocation:
    """Return the allocation of an earlier run's file or output folder, of some linears or of all.

    Raises:
        NeuroalError: The file is not an allocation, or is of another model.
    """
    tensors, importance = load(path / FILE if path.is_dir() else path)
    ratios = {name: float(t) if t.numel() == 1 else t for name, t in tensors.items()}
    try:
        return Allocation.of(ratios, layout, importance, partial=True)
    except NeuroalError as error:
        raise NeuroalError(f"allocation '{path}' does not fit the model: {error}") from error

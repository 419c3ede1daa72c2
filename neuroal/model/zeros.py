"""Zeros of linears, counted in a model in memory or in the files of a saved one.

In memory and on disk weights may be arranged differently: experts stacked in one parameter are
separate tensors in the files. So rows are numbered, and the numbers are converted as the weights
are when they are saved: where a number comes out, its row lies.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError
from neuroal.layout import Block, Layout, Linear, matrices
from neuroal.model.file_names import FileNames
from neuroal.model.files import Shards
from neuroal.model.pretrained import file_tensors

MANY = 0.1  # share of zeros from which on a linear is sparse already
SAMPLED, ROWS = 256, 16  # tensors of a saved model that are looked at, and rows of each


@dataclass(frozen=True)
class Zeros:
    """Zeros of one linear's weight.

    Attributes:
        zeros: How many entries are exactly zero.
        rows: float64 `(out,)`, the share of zeros in every row.
        tensors: Names of the file tensors that hold the weight; empty for a model in memory.
    """

    zeros: int
    rows: Tensor
    tensors: tuple[str, ...] = ()


def rows_of_zeros(block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Return the zeros in every row of a block's linears, int64 `(out,)`, by linear name."""
    weights = {x.name: matrices.weight(x, module, block.name) for x in block.linears}
    if not weights:
        return {}
    rows = torch.cat([(weight == 0).sum(dim=1) for weight in weights.values()]).cpu()
    return dict(zip(weights, torch.split(rows, [len(w) for w in weights.values()]), strict=True))


def count_zeros(model: nn.Module, layout: Layout) -> dict[str, Zeros]:
    """Return the zeros of every linear of a model in memory."""
    result = {}
    for block in layout.blocks:
        rows = rows_of_zeros(block, model.get_submodule(block.name))
        for x in block.linears:
            zeros = rows[x.name]
            result[x.name] = Zeros(int(zeros.sum()), zeros.double() / x.in_features)
    return result


def sampled_zeros(folder: Path, layout: Layout, model: nn.Module) -> float:
    """Return about which share of a saved model's weights are zeros that linears have many of.

    A few rows are read of at most `SAMPLED` of the tensors that hold linears.

    Args:
        folder: Holds the files.
        layout: Of the model.
        model: Names alone are read.

    Returns:
        In [0, 1]; 0 where no linear in the sample has a tenth of zeros.

    Raises:
        NeuroalError: The folder holds no safetensors files, or broken ones.
    """
    shards = Shards(folder)
    names = FileNames(model)
    parameters = {x.place.parameter for x in layout.linears.values()}
    slices = shards.slices(shards.ranges)
    shapes = {name: tensor.get_shape() for name, tensor in slices.items()}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1 and 0 not in shape]
    step = -(-len(matrices) // SAMPLED)  # rounded up
    weights = zeros = 0.0
    for name in matrices[::step] if matrices else ():
        if names.parameter(name) not in parameters:
            continue
        size = math.prod(slices[name].get_shape())
        middle = max(0, slices[name].get_shape()[0] // 2 - ROWS // 2)
        share = float((slices[name][middle : middle + ROWS] == 0).double().mean())
        weights += size
        zeros += share * size if share >= MANY else 0
    return zeros / weights if weights else 0.0


def count_saved_zeros(folder: Path, layout: Layout, model: nn.Module) -> dict[str, Zeros]:
    """Return the zeros of every linear as the safetensors files hold them.

    Args:
        folder: Holds the files.
        layout: Of the model.
        model: The model that was saved; only names and shapes are read.

    Raises:
        NeuroalError: A linear's weight is not wholly in the files.
    """
    shards = Shards(folder)
    result: dict[str, Zeros] = {}
    for block in layout.blocks:
        result |= _block_zeros(block, model, shards)
    return result


def _block_zeros(block: Block, model: nn.Module, shards: Shards) -> dict[str, Zeros]:
    """Return the zeros of a block's linears, read from the files one tensor at a time."""
    sizes = [x.out_features for x in block.linears]
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # (rows,)
    zeros = torch.zeros(sum(sizes), dtype=torch.int64)  # of every row
    columns = torch.zeros_like(zeros)  # how many weights of every row are counted
    tensors: dict[str, list[str]] = defaultdict(list)
    for name, numbers in _row_numbers(block, model).items():
        rows = torch.unique(numbers[numbers >= 0]).long()
        # The same weight may be in the files under one of its names only.
        if name not in shards.ranges or not len(rows) or bool(columns[rows].all()):
            continue
        zero = shards.read(name) == 0
        if axes := tuple(axis for axis, n in enumerate(numbers.shape) if n == 1):
            counts = zero.sum(dim=axes, keepdim=True)
        else:
            counts = zero.long()
        own = numbers >= 0
        width = zero.numel() // numbers.numel()
        zeros.index_add_(0, numbers[own].long(), counts[own])
        columns.index_add_(0, numbers[own].long(), torch.full_like(counts[own], width))
        for owner in torch.unique(owners[rows]).tolist():
            tensors[block.linears[owner].name].append(name)
    result = {}
    for x, of_rows, counted in zip(
        block.linears, torch.split(zeros, sizes), torch.split(columns, sizes), strict=True
    ):
        if bool((counted != x.in_features).any()):
            raise NeuroalError(f"linear '{x.name}' is not, or not wholly, in the saved files")
        share = of_rows.double() / x.in_features
        result[x.name] = Zeros(int(of_rows.sum()), share, tuple(tensors[x.name]))
    return result


def _row_numbers(block: Block, model: nn.Module) -> Mapping[str, Tensor]:
    """Return the numbers of the rows that file tensors hold, by tensor name; -1 for none.

    Rows are numbered through all linears of the block. An axis along which all columns of a row
    lie has length 1 where the conversion allows it.
    """
    try:
        return file_tensors(model, _numbered(block, model, narrow=True))
    except (RuntimeError, ValueError):
        return file_tensors(model, _numbered(block, model, narrow=False))


def _numbered(block: Block, model: nn.Module, narrow: bool) -> dict[str, Tensor]:
    """Return row numbers in the place of weights, int32, by every name of every parameter."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    state: dict[str, Tensor] = {}
    start = 0
    for x in block.linears:
        parameter = model.get_parameter(x.place.parameter)
        if x.place.parameter not in state:
            shape = list(parameter.shape)
            axis = _column_axis(x, parameter)
            if narrow and axis is not None:
                shape[axis] = 1
            numbers = torch.full(shape, -1, dtype=torch.int32)
            state |= dict.fromkeys(names[id(parameter)], numbers)
        numbers = state[x.place.parameter]
        rows = torch.arange(start, start + x.out_features, dtype=torch.int32)
        if numbers.shape == parameter.shape:
            matrices.view(x, numbers).copy_(rows[:, None].expand(-1, x.in_features))
        else:
            first = x.place.offset + torch.arange(x.out_features) * x.place.strides[0]
            numbers[torch.unravel_index(first, parameter.shape)] = rows  # of each first column
        start += x.out_features
    return state


def _column_axis(linear: Linear, parameter: Tensor) -> int | None:
    """Return the axis of a parameter that holds all columns of a row and nothing else."""
    axes = zip(parameter.shape, parameter.stride(), strict=True)
    whole = (linear.in_features, linear.place.strides[1])
    return next((i for i, axis in enumerate(axes) if axis == whole), None)

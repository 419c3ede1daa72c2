"""Which tensors of a checkpoint's files hold which rows of which linear.

In memory and on disk weights may be arranged differently: experts stacked in one parameter are
separate tensors in the files. Row numbers are sent through the same conversion as the weights, and
where they come out is where the rows lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuroal.errors import NeuroalError
from neuroal.layout import Block, Layout, Linear, matrices
from neuroal.layout.matrices import view
from neuroal.model.files import Shards, open_file
from neuroal.model.pretrained import file_tensors

Convert = Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]]
"""From parameters by their names in the model to tensors by their names in the files."""


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

    @classmethod
    def of(cls, weight: Tensor) -> Zeros:
        """Count the zeros of `weight (out, in)`."""
        zero = weight.detach() == 0
        rows = zero.sum(dim=1).double().cpu() / weight.shape[1]
        return cls(int(zero.sum()), rows)


@dataclass
class _Rows:
    """The rows of a block's linears, numbered one linear after the other."""

    block: Block
    zeros: Tensor
    columns: Tensor
    tensors: dict[str, list[str]] = field(default_factory=dict)

    def starts(self) -> list[int]:
        """Return the number of every linear's first row."""
        return [0, *accumulate(x.out_features for x in self.block.linears)]


def _block_zeros(
    block: Block,
    model: nn.Module,
    convert: Convert,
    read: Callable[[str], Tensor | None],
) -> dict[str, Zeros]:
    """Return the zeros of a block's linears, counted on tensors as the files hold them.

    Args:
        block: The block.
        model: The model it is of; shapes and names alone are read.
        convert: What happens to parameters when they are saved.
        read: Returns a file tensor by name, None where there is no such tensor.

    Raises:
        NeuroalError: A linear is not wholly in the files.
    """
    total = sum(x.out_features for x in block.linears)
    zero = torch.zeros(total, dtype=torch.int64)
    rows = _Rows(block, zero, zero.clone())
    starts = rows.starts()
    for key, numbers in _numbers(block, model, convert).items():
        tensor = read(key)
        used = torch.unique(numbers[numbers >= 0]).long()
        if tensor is None or not len(used) or bool(rows.columns[used].all()):
            continue  # the same weight may be in the files under one of its names only
        spread = tuple(d for d, n in enumerate(numbers.shape) if n == 1)
        hit, width = (tensor == 0).cpu(), tensor.numel() // numbers.numel()
        counts = hit.sum(dim=spread, keepdim=True) if spread else hit.long()
        flat, keep = numbers.flatten().long(), numbers.flatten() >= 0
        rows.zeros.index_add_(0, flat[keep], counts.flatten()[keep])
        rows.columns.index_add_(0, flat[keep], torch.full_like(flat[keep], width))
        for x, start in zip(block.linears, starts, strict=False):
            if bool(((used >= start) & (used < start + x.out_features)).any()):
                rows.tensors.setdefault(x.name, []).append(key)
    found: dict[str, Zeros] = {}
    for x, start in zip(block.linears, starts, strict=False):
        part = slice(start, start + x.out_features)
        if bool((rows.columns[part] != x.in_features).any()):
            raise NeuroalError(f"linear '{x.name}' is not, or not wholly, in the saved files")
        zeros = rows.zeros[part]
        share = zeros.double() / x.in_features
        found[x.name] = Zeros(int(zeros.sum()), share, tuple(rows.tensors[x.name]))
    return found


def _numbers(block: Block, model: nn.Module, convert: Convert) -> Mapping[str, Tensor]:
    """Return the row numbers that a block's file tensors hold, by tensor name; -1 for none.

    A dimension along which all columns of a row lie has length 1 where the conversion allows it.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for narrow in (True, False):
        state: dict[str, Tensor] = {}
        start = 0
        for x in block.linears:
            own = model.get_parameter(x.place.parameter)
            for name in aliases[id(own)]:
                if name not in state:
                    state[name] = _blank(x, own, narrow)
            _number(x, own, state[x.place.parameter], start)
            start += x.out_features
            for name in aliases[id(own)]:
                state[name] = state[x.place.parameter]
        try:
            return convert(model, state)
        except (RuntimeError, ValueError):
            if not narrow:
                raise
    raise AssertionError("unreachable")


def _axes(linear: Linear, parameter: Tensor) -> tuple[int, int] | None:
    """Return along which dimensions of a parameter a linear's rows and columns lie."""
    down, right = linear.place.strides
    strides = list(parameter.stride())
    if right in strides and down in strides:
        across = strides.index(right)
        if parameter.shape[across] == linear.in_features:
            return strides.index(down), across
    return None


def _blank(linear: Linear, parameter: Tensor, narrow: bool) -> Tensor:
    shape: list[Any] = list(parameter.shape)
    axes = _axes(linear, parameter)
    if narrow and axes is not None:
        shape[axes[1]] = 1
    return torch.full(shape, -1, dtype=torch.int32)


def _number(linear: Linear, parameter: Tensor, numbers: Tensor, start: int) -> None:
    """Write the numbers of a linear's rows where its weights lie."""
    values = torch.arange(start, start + linear.out_features, dtype=torch.int32)
    if numbers.shape == parameter.shape:
        view(linear, numbers).copy_(values[:, None].expand(-1, linear.in_features))
        return
    axes = _axes(linear, parameter)
    assert axes is not None
    rest = linear.place.offset
    for axis, stride in enumerate(parameter.stride()):
        index, rest = divmod(rest, stride)
        if axis == axes[0]:
            numbers = numbers.narrow(axis, index, linear.out_features)
        elif axis != axes[1]:
            numbers = numbers.narrow(axis, index, 1)
    shape = [1] * numbers.dim()
    shape[axes[0]] = linear.out_features
    numbers.copy_(values.reshape(shape))


def count_zeros(model: nn.Module, layout: Layout) -> dict[str, Zeros]:
    """Return the zeros of every linear of a model in memory."""
    return {name: Zeros.of(matrices.weight(x, model)) for name, x in layout.linears.items()}


def count_saved_zeros(folder: Path, layout: Layout, model: nn.Module) -> dict[str, Zeros]:
    """Return the zeros of every linear as the safetensors files hold them.

    Args:
        folder: Holds the files.
        layout: Of the model.
        model: The model that was saved; only names and shapes are read.

    Raises:
        NeuroalError: A linear's weight is not wholly in the files.
    """
    where: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        where |= dict.fromkeys(Shards.header(path), path)
    result: dict[str, Zeros] = {}
    for block in layout.blocks:
        with ExitStack() as stack:  # a block's files alone are mapped into memory
            opened = cache(lambda path: stack.enter_context(open_file(path)))

            def read(key: str) -> Tensor | None:
                return opened(where[key]).get_tensor(key) if key in where else None  # noqa: B023

            result |= _block_zeros(block, model, file_tensors, read)
    return result

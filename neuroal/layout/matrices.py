"""Where matrices lie in a model's parameters, and when they multiply an input.

A linear is a matrix `(out, in)` in a parameter: all of it, all of it transposed, or a slice of a
stack. `view` returns it, `overlay` and `write` replace its values, and `Products` reports
every product of an input with such a matrix, whatever module or function computes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuroal.layout.parts import Linear, Place


def view(matrix: Linear, parameter: Tensor) -> Tensor:
    """Return a matrix `(out, in)` as a view of the parameter that holds it."""
    shape, place = (matrix.out_features, matrix.in_features), matrix.place
    if place.offset == 0 and parameter.shape == shape and parameter.stride() == place.strides:
        return parameter
    return parameter.as_strided(shape, place.strides, parameter.storage_offset() + place.offset)


def local(matrix: Linear, prefix: str) -> str:
    """Return the name of a matrix's parameter within the module called `prefix`."""
    return matrix.place.parameter.removeprefix(f"{prefix}.") if prefix else matrix.place.parameter


def weight(matrix: Linear, module: nn.Module, prefix: str = "") -> Tensor:
    """Return a linear's weight `(out, in)`, a detached view of its parameter."""
    return view(matrix, module.get_parameter(local(matrix, prefix)).detach())


def overlay(
    matrices: Mapping[str, Linear], weights: Mapping[str, Tensor], module: nn.Module, prefix: str
) -> dict[str, Tensor]:
    """Return new parameters with matrices `(out, in)` replaced, by name within the module.

    The module, called `prefix` in the model, is not changed.
    """
    parameters: dict[str, Tensor] = {}
    for name, values in weights.items():
        matrix = matrices[name]
        key = local(matrix, prefix)
        own = module.get_parameter(key)
        if values.shape == own.shape and values.stride() == own.stride() == matrix.place.strides:
            parameters[key] = values
            continue
        if key not in parameters:
            parameters[key] = own.detach().clone(memory_format=torch.preserve_format)
        view(matrix, parameters[key]).copy_(values)
    return parameters


def write(
    matrices: Mapping[str, Linear], weights: Mapping[str, Tensor], module: nn.Module, prefix: str
) -> None:
    """Copy new weights `(out, in)` into their parameters."""
    with torch.no_grad():
        for name, values in weights.items():
            weight(matrices[name], module, prefix).copy_(values)


# -- products --------------------------------------------------------------------------------

Seen = Callable[[Place, tuple[int, int], Tensor], None]
"""Called before every product: where its matrix lies, its shape, and its input `(..., in)`."""

_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "_grouped_mm"})


class Products(TorchFunctionMode):
    """Reports every product of an input with a matrix that lies in one of some parameters.

    Attributes:
        left: Whether the last matrix was the left factor: `W @ X`, with outputs in columns.
    """

    left = False

    def __init__(self, parameters: Mapping[str, Tensor], seen: Seen) -> None:
        """Watch parameters, by the name that they are reported under."""
        super().__init__()
        spans = [(_address(p), name, p) for name, p in parameters.items()]
        self._spans = sorted(spans, key=itemgetter(0))
        self._starts = [start for start, _, _ in self._spans]
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Report a product, then compute what was asked for."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            operands = _operands(name, args, kwargs)
            self._report(name, *operands)
            # On meta tensors its result is made here: kernels differ in what they accept.
            if name == "_grouped_mm" and operands[0].is_meta:
                return operands[0].new_empty((*operands[0].shape[:-1], operands[1].shape[-1]))
        return func(*args, **kwargs)

    def _report(self, name: str, a: Tensor, b: Tensor, offsets: Tensor | None) -> None:
        left, right = self._owner(a), self._owner(b)
        if right is not None and left is None:
            ends = None if offsets is None or offsets.is_meta else offsets.tolist()
            self.left = False
            for place, shape, index in _matrices(*right, b if name == "linear" else b.mT):
                self._seen(place, shape, _part(a, index, ends))
        elif left is not None and right is None and b.dim() > 1:
            self.left = True
            for place, shape, index in _matrices(*left, a):
                self._seen(place, shape, _part(b.mT, index, None))

    def _owner(self, tensor: Tensor) -> tuple[str, int] | None:
        """Return which parameter a tensor is a view of, and the elements before it."""
        if tensor.dim() < 2:
            return None
        address = _address(tensor)
        k = bisect_right(self._starts, address) - 1
        if k < 0:
            return None
        start, name, own = self._spans[k]
        before = (address - start) // own.element_size()
        if before >= own.numel() or tensor.dtype != own.dtype or tensor.device != own.device:
            return None
        return name, before


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's first element, an invented one for a meta tensor."""
    if tensor.is_meta:
        within = int(tensor.storage_offset()) * tensor.element_size()
        return int(tensor.untyped_storage()._cdata) * 2**48 + within
    return tensor.data_ptr()


def _operands(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the factors of a product, and where the groups of a grouped one end."""
    given = list(args)
    if name in ("addmm", "baddbmm"):
        given = given[1:]
    names = ("input", "weight") if name == "linear" else ("mat1", "mat2")
    others = (("input", "other"), ("self", "mat2"), ("batch1", "batch2"))
    for pair in (names, *others):
        given += [kwargs[key] for key in pair if key in kwargs and len(given) < 2]
    offsets = kwargs.get("offs", args[2] if name == "_grouped_mm" and len(args) > 2 else None)
    return given[0], given[1], offsets


def _matrices(
    name: str, before: int, stack: Tensor
) -> Iterator[tuple[Place, tuple[int, int], tuple[int, ...]]]:
    """Yield every matrix of `stack (..., out, in)`, with its index in the stack."""
    rows, columns = stack.shape[-2:]
    down, right = stack.stride()[-2:]
    lengths = [range(n if step else 1) for n, step in zip(stack.shape, stack.stride(), strict=True)]
    for index in product(*lengths[:-2]):
        offset = before + sum(i * step for i, step in zip(index, stack.stride(), strict=False))
        yield Place(name, offset, (down, right)), (rows, columns), index


def _part(x: Tensor, index: tuple[int, ...], ends: list[int] | None) -> Tensor:
    """Return the part of an input that multiplies the matrix at `index` of a stack."""
    if ends is not None and index:
        return x[ends[index[0] - 1] if index[0] else 0 : ends[index[0]]]
    if x.dim() - 2 < len(index):  # one input for the whole stack
        return x
    for axis, i in zip(range(x.dim() - 2 - len(index), x.dim() - 2), index, strict=True):
        x = x.narrow(axis, min(i, x.shape[axis] - 1), 1)
    return x

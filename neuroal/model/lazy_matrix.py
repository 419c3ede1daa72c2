"""Matrices that stay in their safetensors file: what is read of one is let go of after use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuroal.model.files import DTYPES, FileRange

PART = 1 << 20  # bytes of a matrix that are read at once
_aten = torch.ops.aten


class LazyMatrix(Tensor):
    """A matrix `(rows, columns)` that is read from a file by every operation on it, and not kept.

    An embedding reads the rows of its tokens, and what compares reads part by part; any other
    operation reads all of it. A cast is kept in mind until then.

    Attributes:
        source: Its bytes in its file.
        stored: Its dtype in the file.
    """

    source: FileRange
    stored: torch.dtype
    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        source: FileRange,
        shape: Any,
        stored: torch.dtype,
        dtype: Any = None,
        device: Any = "cpu",
    ) -> LazyMatrix:
        """Return the matrix of a range; `dtype` and `device` are those that operations see."""
        made: LazyMatrix = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype or stored, device=device
        )
        made.source, made.stored = source, stored
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do an operation on what it needs of the matrices among its arguments."""
        kwargs, first = kwargs or {}, args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return first._as(first.dtype, first.device)
        if func is _aten._to_copy.default and not kwargs.keys() - {"dtype", "device"}:
            return first._as(kwargs.get("dtype"), kwargs.get("device"))
        if func is _aten.embedding.default and not isinstance(args[1], cls):
            return first.embed(args[1])
        if func is _aten.equal.default and all(isinstance(x, cls) for x in args):
            same = first.shape == args[1].shape and first.dtype == args[1].dtype
            return same and all(map(torch.equal, *map(parts, args)))
        whole = pytree.tree_map_only(cls, cls.read, (args, kwargs))
        return func(*whole[0], **whole[1])

    def _as(self, dtype: torch.dtype | None, device: torch.device | None) -> LazyMatrix:
        to = (dtype or self.dtype, device or self.device)
        return LazyMatrix(self.source, self.shape, self.stored, *to)

    def read(self) -> Tensor:
        """Return all of it."""
        made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        start = 0
        for part in self.parts():
            made[start : start + len(part)] = part
            start += len(part)
        return made

    def parts(self) -> Iterator[Tensor]:
        """Yield its rows in order, so many at a time as memory is meant for."""
        step = max(1, PART // (self.shape[1] * self.stored.itemsize or 1))
        for start in range(0, self.shape[0], step):
            yield self._rows([(start, min(start + step, self.shape[0]))])

    def embed(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids, of which each is read once."""
        tokens, at = torch.unique(ids, return_inverse=True)
        tokens = tokens.cpu()
        runs = torch.tensor_split(tokens, (tokens.diff() != 1).nonzero()[:, 0] + 1)
        return self._rows([(int(run[0]), int(run[-1]) + 1) for run in runs])[at]

    def _rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """Return runs of rows, from the first to before the last of each, below one another."""
        count = sum(end - start for start, end in runs)
        rows = torch.empty((count, self.shape[1]), dtype=self.stored)
        left = memoryview(rows.view(torch.uint8).numpy().data).cast("B")
        size = self.shape[1] * self.stored.itemsize
        with self.source.file.open("rb", buffering=0) as file:
            for start, end in runs:
                file.seek(self.source.start + start * size)
                end_of_run = len(left) - (end - start) * size
                while len(left) > end_of_run:
                    read = file.readinto(left[: len(left) - end_of_run])
                    if not read:
                        raise OSError(f"'{self.source.file}' ends before its tensors do")
                    left = left[read:]
        return rows.to(self.device, self.dtype)


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor as it is, but one that stays in its file part by part."""
    return tensor.parts() if isinstance(tensor, LazyMatrix) else iter((tensor,))


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, matrices that stay in theirs part by part."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Larger elements first, so that every tensor is aligned, as safetensors does.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        x = tensors[name]
        start, end = end, end + x.numel() * x.itemsize
        entry = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in parts(tensors[name]):
                data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                stream.write(data.numpy().data)

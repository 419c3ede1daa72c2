"""Matrices that stay on disk: every use reads them from their safetensors file again."""

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
    """A matrix `(rows, columns)` that every operation on it reads from its file and then discards.

    An embedding reads only the rows of its tokens, a comparison reads part by part, and any other
    operation reads the whole matrix. A cast to another dtype or device is applied when it is read.

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
        matrix: LazyMatrix = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype or stored, device=device
        )
        matrix.source, matrix.stored = source, stored
        return matrix

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, having read what it needs of the lazy matrices among its arguments."""
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
        """Return the whole matrix."""
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        start = 0
        for part in self.parts():
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def parts(self) -> Iterator[Tensor]:
        """Yield its rows in order, about `PART` bytes at a time."""
        step = max(1, PART // (self.shape[1] * self.stored.itemsize or 1))
        for start in range(0, self.shape[0], step):
            yield self._rows([(start, min(start + step, self.shape[0]))])

    def embed(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids; each distinct row is read once."""
        tokens, at = torch.unique(ids, return_inverse=True)
        tokens = tokens.cpu()
        runs = torch.tensor_split(tokens, (tokens.diff() != 1).nonzero()[:, 0] + 1)
        return self._rows([(int(run[0]), int(run[-1]) + 1) for run in runs])[at]

    def _rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """Return runs of rows, each from its first to before its end, concatenated."""
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
    """Yield the whole tensor, or a lazy matrix part by part."""
    return tensor.parts() if isinstance(tensor, LazyMatrix) else iter((tensor,))


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; lazy matrices are copied part by part."""
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

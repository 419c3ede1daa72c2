"""Arguments and outputs of blocks, batch by batch: stored in memory, or in a file.

The file has no name. The system removes it when the run closes it or the process ends, however
that ends: nothing is ever left on the disk. Reads and writes go through the system's file cache,
which keeps in memory what it has room for.
"""

from __future__ import annotations

import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from neuroal.errors import NeuroalError

_ALIGNED = 64  # elements: more bytes than any processor's vectors have

T = TypeVar("T")


class Store(Protocol[T]):
    """Values that are appended one by one and read in any order; a list is a store."""

    def append(self, value: T, /) -> None: ...
    def __getitem__(self, index: int, /) -> T: ...
    def __iter__(self) -> Iterator[T]: ...
    def __len__(self) -> int: ...


MakeStore = Callable[[], Store[Any]]
"""Makes an empty store: `list`, or what `on_disk` yields."""


@contextmanager
def on_disk(folder: Path) -> Iterator[MakeStore]:
    """Yield what makes stores whose tensors lie in one file on the disk of a folder.

    Raises:
        NeuroalError: The folder cannot be written to.
    """
    try:
        file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 (its errors alone)
    except OSError as error:
        raise NeuroalError(f"'{folder}' cannot hold activations: {error.strerror}") from error
    with file:
        yield partial(_DiskStore, _TensorFile(file))


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file: the bytes that it spans, and its layout within them.

    Strides and alignment are kept: the rounding of kernels may depend on them.
    """

    start: int
    size: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor, start: int) -> tuple[StoredTensor, memoryview]:
        """Return what a plain tensor is from `start` on in a file, and its bytes."""
        offset = int(x.storage_offset() % _ALIGNED)
        span = offset + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        memory = x.detach().as_strided((span,), (1,), x.storage_offset() - offset)
        data = memory.cpu().view(torch.uint8).numpy()
        stored = cls(start, data.nbytes, x.dtype, x.device, x.shape, x.stride(), offset)
        return stored, memoryview(data.data)

    def read(self, file: FileIO) -> Tensor:
        """Return a copy of the tensor."""
        data = torch.empty(self.size, dtype=torch.uint8)
        file.seek(self.start)
        left = memoryview(data.numpy().data)
        while left:  # the system may read only a part
            count = file.readinto(left)
            if not count:
                raise OSError(f"'{file.name}' is too short")
            left = left[count:]
        memory = data.view(self.dtype).to(self.device)
        return memory.as_strided(self.shape, self.stride, self.offset)


def write_bytes(file: FileIO, data: memoryview) -> None:
    """Write all of them where the file stands; the system may write only a part at a time."""
    while data:
        data = data[file.write(data) :]


def is_plain(x: Any) -> bool:
    """Return whether a value is a strided tensor of no kind of its own, with something in it."""
    plain = type(x) is Tensor and x.layout is torch.strided and not x.is_conj()
    return plain and x.numel() > 0


class _DiskStore:
    """Trees (lists, dicts, named tuples) of which the tensors are in the file."""

    def __init__(self, file: _TensorFile) -> None:
        self._file = file
        self._items: list[tuple[list[Any], pytree.TreeSpec]] = []

    def append(self, value: Any) -> None:
        leaves, spec = pytree.tree_flatten(value)
        self._items.append(([self._file.stored(x) for x in leaves], spec))

    def __getitem__(self, index: int) -> Any:
        leaves, spec = self._items[index]
        # A tensor that occurs twice in a value stays one object.
        tensors = {x: self._file.read(x) for x in leaves if isinstance(x, StoredTensor)}
        return pytree.tree_unflatten(
            [tensors[x] if isinstance(x, StoredTensor) else x for x in leaves], spec
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._items)


class _TensorFile:
    """Tensors as bytes; the space of a tensor that nothing refers to any more is used again."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # starts by size
        # A tensor that block after block passes on unchanged is written once.
        self._known = WeakIdKeyDictionary()

    def stored(self, x: Any) -> Any:
        """Store a tensor; return anything else, parameters included, as it is."""
        if not is_plain(x):
            return x
        if x not in self._known:
            self._known[x] = self._write(x)
        return self._known[x]

    def _write(self, x: Tensor) -> StoredTensor:
        stored, data = StoredTensor.of(x, 0)
        free = self._free[stored.size]
        start = free.pop() if free else self._end
        self._end = max(self._end, start + stored.size)
        stored = replace(stored, start=start)
        weakref.finalize(stored, free.append, start).atexit = False
        try:
            self._file.seek(start)
            write_bytes(self._file, data)
        except OSError as error:
            raise NeuroalError(f"activations cannot be held on the disk: {error}") from error
        return stored

    def read(self, stored: StoredTensor) -> Tensor:
        """Return a copy of a tensor."""
        x = stored.read(self._file)
        self._known[x] = stored
        return x

"""A packed file, opened as if it were the dense one.

Sizes, counts and hashes are checked before memory is taken for what they promise.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroal.errors import NeuroalError
from neuroal.packed import codec, form
from neuroal.packed import header as headers
from neuroal.packed.codec import RATIO, Bytes
from neuroal.packed.header import DTYPES, Entry

_ONE = threading.Lock()  # transformers reads in several threads: one matrix at a time is unpacked


@dataclass(frozen=True)
class Stored:
    """How a matrix of a packed file is stored.

    Attributes:
        name: In the files.
        dense: Bytes in the dense file.
        bytes: Bytes in the packed file, its mask among them.
        packed: Whether it is packed; if not, it would not have become smaller.
    """

    name: str
    dense: int
    bytes: int
    packed: bool


def packed(file: Path) -> PackedFile | None:
    """Open a safetensors file if it is packed; None if it is not.

    Raises:
        NeuroalError: It is broken.
    """
    return PackedFile(file) if form.is_packed(headers.read_text(file)) else None


class PackedFile:
    """A packed file; what `safetensors.safe_open` returns for the dense one has the same methods.

    Attributes:
        file: Where it is.
        form: What its header says.
    """

    def __init__(self, file: Path) -> None:
        """Read and check the header.

        Raises:
            NeuroalError: It is broken.
        """
        self.file = file
        self.form = form.read(headers.read(file), f"'{file}'")

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing: every read opens the file."""

    def keys(self) -> list[str]:
        """Return the names of the dense file's tensors."""
        return sorted(self.form.dense.tensors)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the dense file."""
        return dict(self.form.dense.metadata)

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor of the dense file.

        Raises:
            NeuroalError: Its bytes are not those that were written.
        """
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise NeuroalError(f"'{name}' of '{self.file}' has the dtype {entry.dtype:.20}")
        with _ONE:
            data = self.dense_bytes(name)
        if not len(data):
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.from_numpy(data).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def get_slice(self, name: str) -> PackedSlice:
        """Return a tensor of the dense file that is read when it is indexed."""
        return PackedSlice(self, name, self._entry(name))

    def matrices(self) -> list[Stored]:
        """Return how its tensors of at least two dimensions are stored."""
        found = []
        for name, x in self.form.dense.tensors.items():
            if len(x.shape) > 1:
                mask = self.form.mask(name)
                size = self.form.header.tensors[name].size + (mask.size if mask else 0)
                found.append(Stored(name, x.size, size, mask is not None))
        return found

    def _entry(self, name: str) -> Entry:
        try:
            return self.form.dense.tensors[name]
        except KeyError:
            raise NeuroalError(f"'{self.file}' holds no tensor '{name}'") from None

    def dense_bytes(self, name: str) -> Bytes:
        """Return the bytes that a tensor has in the dense file; as in `get_tensor`."""
        entry, mask = self.form.dense.tensors[name], self.form.mask(name)
        stored = self.form.header.tensors[name]
        known = form.digest(name, entry)
        parts = [self._read(x) for x in (mask, stored) if x is not None]
        for part in parts:
            known.update(part.data)
        what = f"'{name}' of '{self.file}'"
        if known.hexdigest() != self.form.digests[name]:
            raise NeuroalError(f"{what} is broken: its SHA-256 is another than when it was packed")
        if mask is None:
            return parts[0]
        bits = codec.decompress(parts[0], (entry.count + 7) // 8, f"the mask of {what}")
        size = (entry.count - codec.pruned(bits)) * entry.item
        planes = stored.dtype == "U8"
        if (bits[-1:] & (0xFF >> (entry.count % 8 or 8))).any() or not (
            stored.size <= size <= RATIO * stored.size if planes else stored.size == size
        ):
            raise NeuroalError(f"{what} is broken: its mask keeps another number of weights")
        values = codec.decompress(parts[1], size, what) if planes else parts[1]
        return codec.expand(bits, values, entry.item, entry.count, planes)

    def _read(self, entry: Entry) -> Bytes:
        data = np.empty(entry.size, np.uint8)
        with self.file.open("rb") as stream:
            stream.seek(self.form.header.data + entry.start)
            if stream.readinto(data.data) != entry.size:
                raise NeuroalError(f"'{self.file}' ends before its tensors do")
        return data


class PackedSlice:
    """A tensor that is read when it is indexed; as `safe_open(...).get_slice` returns."""

    def __init__(self, file: PackedFile, name: str, entry: Entry) -> None:
        """Take the file and the tensor's entry in the dense header."""
        self._file, self._name, self._dense = file, name, entry

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._dense.shape)

    def get_dtype(self) -> str:
        """Return the name of its dtype in the header."""
        return self._dense.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """Return a part of it, or all."""
        return self._file.get_tensor(self._name)[index]

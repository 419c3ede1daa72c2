"""Headers of safetensors files, read by rules that a hostile file cannot bend."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuroal.errors import NeuroalError

LARGEST = 100_000_000  # bytes of a header, as safetensors has it
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"C64": torch.complex64},
}
"""By their names in the header of a safetensors file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: Its name in the header.
        shape: Its lengths.
        start: Its first byte, counted from the end of the header.
        end: Where it ends.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.start

    @property
    def count(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)

    @property
    def item(self) -> int:
        """Bytes of one number; 1 of a dtype that is not known."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        text: As it stands there.
        metadata: Its texts by name.
        tensors: By name, in the order of their bytes.
    """

    text: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, Entry]

    @property
    def data(self) -> int:
        """Where the bytes of the tensors begin in the file."""
        return 8 + len(self.text)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.data + max((x.end for x in self.tensors.values()), default=0)


def read_text(file: Path) -> bytes:
    """Return the header of a safetensors file as it stands there.

    Raises:
        NeuroalError: There is none.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(LARGEST, file.stat().st_size - 8):
                raise NeuroalError(f"cannot read '{file}': its header would have {length} bytes")
            return stream.read(length)
    except OSError as error:
        raise NeuroalError(f"cannot read '{file}': {error}") from error


def read(file: Path) -> Header:
    """Return the header of a safetensors file; its tensors fill the rest of it.

    Raises:
        NeuroalError: It is broken.
    """
    header = parse(read_text(file), f"'{file}'")
    if header.size != file.stat().st_size:
        raise NeuroalError(
            f"'{file}' is broken: it has {file.stat().st_size} bytes, not {header.size}"
        )
    return header


def parse(text: bytes, what: str) -> Header:
    """Return what the text of a header says.

    Raises:
        NeuroalError: It is no header, or its tensors overlap or leave gaps.
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NeuroalError(f"the header of {what} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise NeuroalError(f"the header of {what} is no JSON object")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise NeuroalError(f"the header of {what} is broken: its metadata are no texts")
    entries = {name: _entry(name, entry, what) for name, entry in said.items()}
    tensors = dict(sorted(entries.items(), key=lambda x: (x[1].start, x[1].end)))
    end = 0
    for name, entry in tensors.items():
        if entry.start != end:
            raise NeuroalError(f"the header of {what} is broken: '{name:.99}' begins elsewhere")
        end = entry.end
    return Header(text, metadata, tensors)


def _entry(name: str, said: Any, what: str) -> Entry:
    """Return the entry of a tensor, checked against itself."""
    try:
        dtype, shape, (start, end) = said["dtype"], said["shape"], said["data_offsets"]
        numbers = (*shape, start, end)
        sound = isinstance(dtype, str) and all(type(x) is int and 0 <= x < 2**63 for x in numbers)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise NeuroalError(f"the header of {what} is broken at '{name:.99}'")
    entry = Entry(dtype, tuple(shape), start, end)
    if start > end or (dtype in DTYPES and entry.count * entry.item != entry.size):
        raise NeuroalError(
            f"the header of {what} is broken: '{name:.99}' has {entry.size} bytes for "
            f"{dtype} {list(shape)!s:.99}"
        )
    return entry


def build(tensors: Mapping[str, Entry], metadata: Mapping[str, str], length: int = 0) -> bytes:
    """Return the text of a header, padded to `length` bytes and to a multiple of eight."""
    said: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, x in tensors.items():
        offsets = [x.start, x.end]
        said[name] = {"dtype": x.dtype, "shape": list(x.shape), "data_offsets": offsets}
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(max(length, len(text) + -len(text) % 8))

"""A dense safetensors file to a packed one, and back; one matrix at a time is in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from neuroal.errors import NeuroalError
from neuroal.packed import codec, form
from neuroal.packed import header as headers
from neuroal.packed.codec import Bytes
from neuroal.packed.form import MASK, NO_DIGEST, PACKABLE
from neuroal.packed.header import Entry, Header
from neuroal.packed.reading import PackedFile

_PIECE = 4 << 20
_SAMPLE = 1 << 16  # bytes of a matrix; a multiple of every width
_LARGE = 10**15  # an offset of as many digits as one may have, where it is not known yet


def pack_file(source: Path, target: Path, compress: bool, tick: Callable[[int], object]) -> None:
    """Write the packed form of a safetensors file.

    Args:
        source: The dense file.
        target: The file to write.
        compress: Write zstd frames where they are smaller.
        tick: Called with bytes of the source that are done.

    Raises:
        NeuroalError: The source is broken.
    """
    dense = headers.read(source)
    with source.open("rb") as data, target.open("wb") as out:
        masks = _masks(data, dense)
        room = _room(dense, masks)
        out.seek(8 + room)
        entries, digests = _write(data, dense, masks, compress, out, tick)
        data.seek(0)
        sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        text = headers.build(entries, form.metadata(dense, sha256, digests), room)
        assert len(text) == room
        out.seek(0)
        out.write(room.to_bytes(8, "little") + text)


def estimate(source: Path, compress: bool) -> int:
    """Return about how many bytes `pack_file` writes, by a part of every matrix."""
    dense = headers.read(source)
    total = dense.data
    with source.open("rb") as data:
        for x in dense.tensors.values():
            stored = x.size
            if x.dtype in PACKABLE and len(x.shape) > 1 and x.size:
                length = min(x.size, _SAMPLE)
                at = x.start + (x.size - length) // (2 * x.item) * x.item
                part = _read(data, dense, replace(x, start=at, end=at + length))
                bits = codec.mask_bits(part, x.item)
                values = codec.surviving(part, x.item, bits)
                if compress and len(bits) < codec.pruned(bits) * x.item:
                    values = codec.compress(codec.planes(values, x.item))
                stored = min(x.size, (len(bits) + len(values)) * x.size // length)
            total += stored
    return total


def unpack_file(source: Path, target: Path, tick: Callable[[int], object]) -> None:
    """Write the dense form of a packed file, which is the file that was packed.

    Raises:
        NeuroalError: The source is broken, or what comes out has another SHA-256.
    """
    file = PackedFile(source)
    known = hashlib.sha256()
    with target.open("wb") as out:

        def write(data: bytes | memoryview) -> None:
            known.update(data)
            out.write(data)

        dense = file.form.dense
        write(len(dense.text).to_bytes(8, "little") + dense.text)
        for name, x in dense.tensors.items():
            write(file.dense_bytes(name).data)
            tick(x.size)
    if known.hexdigest() != file.form.sha256:
        raise NeuroalError(f"'{source}' is broken: unpacked, its SHA-256 is not that of the source")


def _room(dense: Header, masks: Mapping[str, Bytes]) -> int:
    """Return the length of a header that has room for any offsets and digests."""
    entries = {
        name: Entry(x.dtype, (_LARGE,) if name in masks else x.shape, _LARGE, _LARGE)
        for name, x in dense.tensors.items()
    }
    entries |= {f"{name}{MASK}": entries[name] for name in masks}
    digests = dict.fromkeys(dense.tensors, NO_DIGEST)
    return len(headers.build(entries, form.metadata(dense, NO_DIGEST, digests)))


def _masks(data: BufferedReader, dense: Header) -> dict[str, Bytes]:
    """Return the mask of every matrix that is smaller packed."""
    masks = {}
    for name, x in dense.tensors.items():
        if x.dtype in PACKABLE and len(x.shape) > 1 and f"{name}{MASK}" not in dense.tensors:
            bits = codec.mask_bits(_read(data, dense, x), x.item)
            if len(bits) < codec.pruned(bits) * x.item:
                masks[name] = bits
    return masks


def _write(
    data: BufferedReader,
    dense: Header,
    masks: Mapping[str, Bytes],
    compress: bool,
    out: BinaryIO,
    tick: Callable[[int], object],
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Write all tensors, wide numbers first to align them; return their entries and digests."""
    entries: dict[str, Entry] = {}
    digests: dict[str, str] = {}
    start = out.tell()

    def keep(name: str, dtype: str, shape: tuple[int, ...], parts: Iterator[Bytes]) -> None:
        first = out.tell() - start
        for part in parts:
            out.write(part.data)
        entries[name] = Entry(dtype, shape, first, out.tell() - start)

    stored = {name: codec.compress(x) if compress else x for name, x in masks.items()}
    order = sorted(
        dense.tensors.items(),
        key=lambda item: -1 if compress and item[0] in masks else -item[1].item,
    )
    for name, x in order:
        known = form.digest(name, x)
        if name not in masks:
            keep(name, x.dtype, x.shape, _hashed(_pieces(data, dense, x), known))
        else:
            known.update(stored[name].data)
            values = codec.surviving(_read(data, dense, x), x.item, masks[name])
            dtype, count = x.dtype, len(values) // x.item
            if compress:
                values = codec.compress(codec.planes(values, x.item))
                dtype, count = "U8", len(values)
            keep(name, dtype, (count,), _hashed(iter((values,)), known))
        digests[name] = known.hexdigest()
        tick(x.size)
    for name, bits in stored.items():
        keep(f"{name}{MASK}", "U8", (len(bits),), iter((bits,)))
    return entries, digests


def _hashed(parts: Iterator[Bytes], known: hashlib._Hash) -> Iterator[Bytes]:
    for part in parts:
        known.update(part.data)
        yield part


def _read(data: BufferedReader, dense: Header, entry: Entry) -> Bytes:
    whole = np.empty(entry.size, np.uint8)
    data.seek(dense.data + entry.start)
    data.readinto(whole.data)
    return whole


def _pieces(data: BufferedReader, dense: Header, entry: Entry) -> Iterator[Bytes]:
    """Yield the bytes of a tensor, a few at a time."""
    data.seek(dense.data + entry.start)
    for at in range(0, entry.size, _PIECE):
        yield np.frombuffer(data.read(min(_PIECE, entry.size - at)), np.uint8)

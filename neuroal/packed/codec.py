"""A matrix as the bits of a mask and the values that survive, and back to the bit.

A weight is pruned where all its bits are zero: −0.0 is a value that survives, and so is every NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from neuroal.errors import NeuroalError

Bytes = npt.NDArray[np.uint8]
RATIO = 64  # a frame holds at most so many times its own bytes
_LEVEL = 1  # of zstd: signs, exponents and mantissas have an entropy, but nothing that repeats
_AT_ONCE = 1 << 16  # weights, which a processor's cache has room for; a multiple of eight


def mask_bits(dense: Bytes, item: int) -> Bytes:
    """Return the mask of a matrix's bytes, `item` a weight: one bit a weight, 1 = pruned.

    The first weight has the highest bit of the first byte; what is left of the last byte is 0.
    """
    return np.packbits(_weights(dense, item) == 0)


def pruned(bits: Bytes) -> int:
    """Return how many weights a mask prunes."""
    return int.from_bytes(bits.tobytes()).bit_count()


def surviving(dense: Bytes, item: int, bits: Bytes) -> Bytes:
    """Return the bytes of the weights that a mask keeps, in order."""
    weights = _weights(dense, item)
    kept = [
        weights[at : at + _AT_ONCE][~_mask(bits, at, len(weights))]
        for at in range(0, len(weights), _AT_ONCE)
    ]
    return np.concatenate([*kept, weights[:0]]).view(np.uint8)


def expand(bits: Bytes, values: Bytes, item: int, count: int, planes: bool) -> Bytes:
    """Return the bytes of a matrix of `count` weights.

    Args:
        bits: Its mask.
        values: The bytes of the weights that survive.
        item: Bytes a weight.
        count: Weights.
        planes: The values are split: first the lowest byte of all, then the next.
    """
    dense = np.empty(count * item, np.uint8)
    weights = _weights(dense, item)
    kept = values.reshape(item, -1).T if planes else values.reshape(-1, item)  # (values, item)
    start = 0
    for at in range(0, count, _AT_ONCE):
        stays = ~_mask(bits, at, count)
        places = np.cumsum(stays, dtype=np.int32)  # of each one that stays, counted from 1
        part = np.zeros((1 + int(places[-1]), item), np.uint8)
        part[1:] = kept[start : start + int(places[-1])]
        # Row 0 is for those that are pruned. This is three times as fast as indexing by the mask.
        np.take(_weights(part.reshape(-1), item), places * stays, out=weights[at : at + len(stays)])
        start += int(places[-1])
    return dense


def planes(values: Bytes, item: int) -> Bytes:
    """Return values with the lowest byte of all first, then the next."""
    return np.ascontiguousarray(values.reshape(-1, item).T).reshape(-1)


def compress(data: Bytes) -> Bytes:
    """Return a zstd frame of some bytes, or the bytes where that is not smaller.

    What a frame would hold more than `RATIO` times its own bytes stays as it is, so that a reader
    never needs more memory than a multiple of the file.
    """
    frame = np.frombuffer(_zstd().compress(data, asbytes=True), np.uint8)
    return frame if len(data) / RATIO <= len(frame) < len(data) else data


def decompress(frame: Bytes, size: int, what: str) -> Bytes:
    """Return the `size` bytes of a frame, or the bytes themselves if they are so many.

    Raises:
        NeuroalError: The frame is broken, or holds another number of bytes.
    """
    if len(frame) == size:
        return frame
    try:
        data = _zstd().decompress(frame, decompressed_size=size, asbytes=True)
    except OSError as error:
        raise NeuroalError(f"{what} is broken: {error}") from error
    if len(data) != size:
        raise NeuroalError(f"{what} is broken: its frame holds {len(data)} bytes, not {size}")
    return np.frombuffer(data, np.uint8)


def _weights(data: Bytes, item: int) -> npt.NDArray[Any]:
    """Return bytes as unsigned numbers."""
    return data.view(np.dtype(f"<u{item}"))


def _mask(bits: Bytes, at: int, count: int) -> npt.NDArray[np.bool_]:
    """Return the mask of some weights from `at`, True = pruned."""
    length = min(_AT_ONCE, count - at)
    part = bits[at // 8 : (at + length + 7) // 8]
    return np.unpackbits(part, count=length).view(np.bool_)


def _zstd() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=_LEVEL)

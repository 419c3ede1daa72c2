"""What a packed file says of itself, and the checks of it: the format, version 1.

A packed file is a safetensors file. A tensor of the dense file is there under its name, as it is;
or it is packed, a matrix of floating numbers: then its name has the values that survive, one after
another, and its name and `:mask` the mask, one bit a weight. Both may be zstd frames. The metadata
hold the header of the dense file as it stood there, the SHA-256 of that file, and one of every
tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from neuroal.errors import NeuroalError
from neuroal.packed.codec import RATIO
from neuroal.packed.header import Entry, Header, parse

VERSION = "1"
METHOD = "neuroal_packed"  # as config.json names it to transformers
KEY = "neuroal_packed"
MASK = ":mask"
PACKABLE = ("BF16", "F16", "F32", "F64")
_HEADER, _FILE, _TENSORS = "dense_header", "dense_sha256", "sha256"
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Form:
    """A packed file, as its header describes it.

    Attributes:
        header: Its own.
        dense: Of the dense file.
        sha256: Of the dense file.
        digests: Of every tensor: see `digest`.
    """

    header: Header
    dense: Header
    sha256: str
    digests: Mapping[str, str]

    def mask(self, name: str) -> Entry | None:
        """Return where the mask of a tensor lies; None if it is there as it is."""
        return self.header.tensors.get(f"{name}{MASK}") if self.is_packed(name) else None

    def is_packed(self, name: str) -> bool:
        """Return whether a tensor is packed."""
        mask = f"{name}{MASK}"
        return mask in self.header.tensors and mask not in self.dense.tensors


def digest(name: str, entry: Entry) -> hashlib._Hash:
    """Return the hash of a tensor so far: what the dense file says of it.

    The bytes of its mask, if it is packed, and then those under its name are still to be added, as
    they are stored.
    """
    return hashlib.sha256(f"{name}\n{entry.dtype}\n{list(entry.shape)}\n".encode())


def metadata(dense: Header, sha256: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a packed file."""
    return {
        "format": dense.metadata.get("format", "pt"),
        KEY: VERSION,
        _HEADER: dense.text.decode(),
        _FILE: sha256,
        _TENSORS: json.dumps(dict(digests), separators=(",", ":"), ensure_ascii=False),
    }


def is_packed(header: bytes) -> bool:
    """Return whether the text of a header is that of a packed file."""
    return f'"{KEY}"'.encode() in header


def read(header: Header, what: str) -> Form:
    """Return what the header of a packed file says, checked against itself.

    Raises:
        NeuroalError: It is of another version, or contradicts itself.
    """
    said = header.metadata
    if said.get(KEY) != VERSION:
        raise NeuroalError(
            f"{what} is packed in version {said.get(KEY)!r:.20}: this neuroal reads {VERSION}"
        )
    dense = parse(said.get(_HEADER, "").encode(), f"what {what} holds")
    try:
        digests = json.loads(said.get(_TENSORS, ""))
    except (ValueError, RecursionError) as error:
        raise NeuroalError(f"{what} is broken: its digests are no JSON: {error}") from error
    if not isinstance(digests, dict) or digests.keys() != dense.tensors.keys():
        raise NeuroalError(f"{what} is broken: it has not a digest of every tensor")
    for value in (said.get(_FILE), *digests.values()):
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise NeuroalError(f"{what} is broken: {value!r:.80} is no SHA-256")
    form = Form(header, dense, said[_FILE], digests)
    masks = {f"{name}{MASK}" for name in dense.tensors if form.is_packed(name)}
    if (wrong := header.tensors.keys() ^ (dense.tensors.keys() | masks)) != set():
        raise NeuroalError(f"{what} is broken: '{min(wrong):.99}' is missing or too many")
    for name, entry in dense.tensors.items():
        if not _fits(entry, header.tensors[name], form.mask(name)):
            raise NeuroalError(f"{what} is broken: '{name:.99}' does not fit what it is packed as")
    return form


def _fits(dense: Entry, stored: Entry, mask: Entry | None) -> bool:
    """Return whether what is stored can be a tensor, by shapes and dtypes alone."""
    if mask is None:
        return (stored.dtype, stored.shape) == (dense.dtype, dense.shape)
    bits = (dense.count + 7) // 8
    flat = len(mask.shape) == len(stored.shape) == 1
    if dense.dtype not in PACKABLE or mask.dtype != "U8" or not flat:
        return False
    if not mask.size <= bits <= RATIO * mask.size:
        return False
    return stored.dtype in (dense.dtype, "U8") and stored.size <= dense.size

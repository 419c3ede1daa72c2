"""Packed files that are broken, by chance and on purpose."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neuroal.errors import NeuroalError
from neuroal.packed.reading import PackedFile
from neuroal.packed.writing import pack_file, unpack_file

SHAPE = (48, 64)


def tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name in ("a.weight", "b.weight", "c.weight"):
        weight = torch.randn(SHAPE, generator=rng).bfloat16()
        made[name] = weight.masked_fill(torch.rand(SHAPE, generator=rng) < 0.6, 0)
    return made | {"norm.weight": torch.randn(64, generator=rng)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "dense.safetensors", metadata={"format": "pt"})
    pack_file(tmp_path / "dense.safetensors", tmp_path / "p.safetensors", True, int)
    return tmp_path / "p.safetensors"


def split(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def flip(data: bytes, rng: random.Random) -> bytes:
    at, changed = rng.randrange(len(data)), bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_header(data: bytes, rng: random.Random) -> bytes:
    header, rest = split(data)
    return joined(flip(header, rng), rest)


def another_number(data: bytes, rng: random.Random) -> bytes:
    """Change a number of the header, its own or the dense one's."""
    header, rest = split(data)
    found = rng.choice(list(re.finditer(rb"\d+", header)))
    other = rng.choice([b"0", b"1", b"7", b"48", b"64", b"3072", b"4294967296", b"9" * 18, b"-1"])
    return joined(header[: found.start()] + other + header[found.end() :], rest)


def another_word(data: bytes, rng: random.Random) -> bytes:
    header, rest = split(data)
    words = [b"BF16", b"F16", b"U8", b"F32", b"I16", b"a.weight", b"b.weight", b":mask", b"pt"]
    old, new = rng.choice(words), rng.choice(words)
    return joined(header.replace(old, new, rng.choice([1, 2, -1])), rest)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]


def swapped(data: bytes, rng: random.Random) -> bytes:
    """Exchange two entries of the header, or of the dense header."""
    header, rest = split(data)
    said = json.loads(header)
    inner = json.loads(said["__metadata__"]["dense_header"])
    where = rng.choice([said, inner])
    one, other = rng.sample([n for n in where if n != "__metadata__"], 2)
    where[one], where[other] = where[other], where[one]
    said["__metadata__"]["dense_header"] = json.dumps(inner)
    return joined(json.dumps(said).encode(), rest)


def random_header(data: bytes, rng: random.Random) -> bytes:
    header, rest = split(data)
    size = rng.choice([0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1])
    return size.to_bytes(8, "little") + header + rest


KINDS: list[Callable[[bytes, random.Random], bytes]] = [
    flip,
    flip_in_header,
    another_number,
    another_word,
    cut,
    longer,
    swapped,
    random_header,
]


def test_500_mutated_files(file: Path) -> None:
    """An error of one line, or the right tensors; and never more memory than the file needs."""
    rng, whole, right = random.Random(0), file.read_bytes(), tensors()
    refused = unpacked = 0
    dense = file.with_name("dense.safetensors").read_bytes()
    for i in range(500):
        file.write_bytes(KINDS[i % len(KINDS)](whole, rng))
        tracemalloc.start()
        try:
            opened = PackedFile(file)
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                assert tensor.dtype == right[name].dtype
                assert torch.equal(tensor, right[name]), f"{i}: {name}"
        except NeuroalError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(whole) + 2**20
        tracemalloc.stop()
        try:
            unpack_file(file, file.with_name("u"), int)
            assert file.with_name("u").read_bytes() == dense
            unpacked += 1
        except NeuroalError:
            pass
    assert refused > 450 and unpacked < 50


class Forged:
    """A packed file whose hashes are right, and the rest is as one likes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        bits = np.packbits(np.array([[1, 0, 0, 0, 1, 1, 0, 0], [0] * 8], bool))
        self.mask: bytes = bits.tobytes()
        self.values: bytes = np.arange(1, 14, dtype=np.uint16).tobytes()
        self.shape = [2, 8]
        self.dtype, self.stored, self.version = "BF16", "BF16", "1"

    def write(self, **metadata: Any) -> Path:
        kept = len(self.values) // (1 if self.stored == "U8" else 2)
        size = 2 * self.shape[0] * self.shape[1]
        dense = {"w": {"dtype": self.dtype, "shape": self.shape, "data_offsets": [0, size]}}
        text = f"w\n{self.dtype}\n{self.shape}\n".encode()
        digest = hashlib.sha256(text + self.mask + self.values).hexdigest()
        end = len(self.values)
        ends = [end, end + len(self.mask)]
        header = {
            "__metadata__": {
                "format": "pt",
                "neuroal_packed": self.version,
                "dense_header": json.dumps(dense),
                "dense_sha256": "0" * 64,
                "sha256": json.dumps({"w": digest}),
            }
            | metadata,
            "w": {"dtype": self.stored, "shape": [kept], "data_offsets": [0, end]},
            "w:mask": {"dtype": "U8", "shape": [len(self.mask)], "data_offsets": ends},
        }
        self.file.write_bytes(joined(json.dumps(header).encode(), self.values + self.mask))
        return self.file


@pytest.fixture
def forged(tmp_path: Path) -> Forged:
    return Forged(tmp_path / "p.safetensors")


def frame(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


def test_what_is_forged_well_is_read(forged: Forged) -> None:
    tensor = PackedFile(forged.write()).get_tensor("w")
    expected = [[0, 1, 2, 3, 0, 0, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13]]
    assert tensor.view(torch.int16).tolist() == expected


def refuses(forged: Forged, match: str, memory: int = 2**20, **metadata: Any) -> None:
    """The file is refused, before more memory is taken than a megabyte."""
    forged.write(**metadata)
    tracemalloc.start()
    with pytest.raises(NeuroalError, match=match) as error:
        PackedFile(forged.file).get_tensor("w")
    assert tracemalloc.get_traced_memory()[1] < memory
    tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_a_mask_that_keeps_another_number(forged: Forged) -> None:
    forged.mask = b"\xff" + forged.mask[1:]
    refuses(forged, "its mask keeps another number of weights")


def test_bits_beyond_the_last_weight(forged: Forged) -> None:
    forged.shape, forged.mask, forged.values = [1, 4], b"\x8f", b"\1\0" * 3
    refuses(forged, "its mask keeps another number of weights")


def test_a_shape_that_no_mask_of_this_size_can_have(forged: Forged) -> None:
    forged.shape, forged.stored = [2**20, 2**20], "U8"
    forged.mask = frame(bytes(2**24))
    refuses(forged, "does not fit what it is packed as")


def test_a_frame_that_holds_more_than_it_may(forged: Forged) -> None:
    forged.stored, forged.values = "U8", frame(bytes(2**24))
    refuses(forged, "does not fit what it is packed as")
    forged.shape, forged.mask = [2, 8], b"\0\0"
    forged.values = frame(bytes(range(32)) * 64)[:31]
    refuses(forged, "is broken: ")


def test_a_frame_of_another_length(forged: Forged) -> None:
    forged.stored, forged.shape, forged.mask = "U8", [64, 64], bytes(512)
    for length in (2 * 4096 - 1, 2 * 4096 + 1, 2**22):
        data = bytes(range(256)) * (length // 256 + 1)
        forged.values = frame(data[:length])
        assert len(forged.values) > 128
        refuses(forged, "is broken: ")


@pytest.mark.parametrize("dtype", ["I16", "F8_E4M3", "XX", ""])
def test_a_matrix_of_another_dtype(dtype: str, forged: Forged) -> None:
    forged.dtype = dtype
    refuses(forged, "does not fit|is broken at|has 32 bytes")


def test_a_version_that_is_not_known(forged: Forged) -> None:
    forged.version = "2"
    refuses(forged, "is packed in version '2': this neuroal reads 1")


@pytest.mark.parametrize("inner", ["", "[]", "[" * 10_000, "{", '{"w": 1}', '{"__metadata__": 1}'])
def test_a_dense_header_that_is_none(inner: str, forged: Forged) -> None:
    refuses(forged, "header of|is broken|no digest", memory=2**24, dense_header=inner)


@pytest.mark.parametrize("sha256", ["", "[]", "{}", '{"w": 1}', '{"w": "0"}', "[" * 10_000])
def test_digests_that_are_none(sha256: str, forged: Forged) -> None:
    refuses(forged, "is broken", memory=2**24, sha256=sha256)


def test_metadata_that_are_no_texts(forged: Forged) -> None:
    refuses(forged, "its metadata are no texts", dense_sha256=1)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"")
    with pytest.raises(NeuroalError, match=r"cannot read.*its header would have 0 bytes"):
        PackedFile(tmp_path / "p")
    with pytest.raises(NeuroalError, match="cannot read"):
        PackedFile(tmp_path / "q")

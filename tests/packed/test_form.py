"""A packed file is what the documentation says, and comes back to the bit."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuroal.errors import NeuroalError
from neuroal.packed import codec
from neuroal.packed.reading import PackedFile, packed
from neuroal.packed.writing import estimate, pack_file, unpack_file

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def sparse(*shape: int, dtype: torch.dtype = torch.bfloat16, ratio: float = 0.5) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=rng).mul(0.02).to(dtype)
    return weight.masked_fill(torch.rand(shape, generator=rng) < ratio, 0)


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        *(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    )


def awkward() -> dict[str, Tensor]:
    """Tensors of many dtypes and shapes, sparse and not, with a negative zero and odd NaNs."""
    bits = sparse(30, 31).view(torch.int16)
    bits[0, :4] = torch.tensor([-(2**15), 0x7FC1, -1, 1])  # −0.0, two NaNs, the least number
    return {
        "bf16": bits.view(torch.bfloat16),
        "f16": sparse(4, 5, 6, dtype=torch.float16),
        "f32": sparse(7, 9, dtype=torch.float32, ratio=0.9),
        "f64": sparse(5, 5, dtype=torch.float64),
        "all zero": torch.zeros(33, 64, dtype=torch.bfloat16),
        "λ, no zero": torch.ones(9, 9, dtype=torch.bfloat16),
        "too few zeros": sparse(64, 64, ratio=0.05),
        "vector": torch.zeros(64),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "int8": torch.zeros(16, 16, dtype=torch.int8),
        "float8": torch.zeros(16, 16).to(torch.float8_e4m3fn),
        "taken": sparse(8, 8),
        "taken:mask": torch.zeros(8, 8),
    }


PACKED = {"bf16", "f16", "f32", "f64", "all zero", "taken:mask"}


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., PackedFile]:
    """Writes tensors into a file and packs it."""

    def make(tensors: dict[str, Tensor], compress: bool = False) -> PackedFile:
        save_file(tensors, tmp_path / "dense.safetensors", metadata={"format": "pt", "by": "me"})
        pack_file(tmp_path / "dense.safetensors", tmp_path / "p.safetensors", compress, int)
        return PackedFile(tmp_path / "p.safetensors")

    return make


def by_the_documentation(file: Path) -> dict[str, bytes]:
    """The dense bytes of every tensor, by the text of docs/howto/pack.md and nothing of neuroal."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    said = header.pop("__metadata__")
    assert said["neuroal_packed"] == "1" and said["format"] == "pt"
    dense, hashes = json.loads(said["dense_header"]), json.loads(said["sha256"])
    assert dense.pop("__metadata__") == {"format": "pt", "by": "me"}
    found = {}
    for name, entry in dense.items():
        start, end = header[name]["data_offsets"]
        stored = raw[8 + size + start : 8 + size + end]
        text = f"{name}\n{entry['dtype']}\n{entry['shape']}\n".encode()
        mask = header.get(f"{name}:mask") if f"{name}:mask" not in dense else None
        if mask is None:
            assert hashlib.sha256(text + stored).hexdigest() == hashes[name]
            found[name] = stored
            continue
        start, end = mask["data_offsets"]
        bits = raw[8 + size + start : 8 + size + end]
        assert hashlib.sha256(text + bits + stored).hexdigest() == hashes[name]
        count = 1
        for length in entry["shape"]:
            count *= length
        if len(bits) < (count + 7) // 8:
            bits = pyarrow.decompress(bits, (count + 7) // 8, "zstd", asbytes=True)
        pruned = [bool(bits[i // 8] >> (7 - i % 8) & 1) for i in range(count)]
        item = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[entry["dtype"]]
        kept = pruned.count(False)
        if header[name]["dtype"] == "U8":
            if len(stored) < kept * item:
                stored = pyarrow.decompress(stored, kept * item, "zstd", asbytes=True)
            values = [bytes(stored[b * kept + i] for b in range(item)) for i in range(kept)]
        else:
            values = [stored[i * item : (i + 1) * item] for i in range(kept)]
        left = iter(values)
        found[name] = b"".join(bytes(item) if gone else next(left) for gone in pruned)
    return found


@pytest.mark.parametrize("compress", [False, True])
def test_every_tensor_comes_back(compress: bool, pack: Callable[..., PackedFile]) -> None:
    tensors = awkward()
    file = pack(tensors, compress)
    assert set(file.keys()) == tensors.keys()
    assert file.metadata() == {"format": "pt", "by": "me"}
    assert {n for n in tensors if file.form.is_packed(n)} == PACKED
    assert {x.name for x in file.matrices() if x.packed} == PACKED
    by_hand = by_the_documentation(file.file)
    for name, tensor in tensors.items():
        assert same(file.get_tensor(name), tensor), name
        assert by_hand[name] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
        part = file.get_slice(name)
        assert part.get_shape() == list(tensor.shape)
        assert same(part[...], tensor)
    assert same(file.get_slice("f32")[2:4, 1:], tensors["f32"][2:4, 1:])
    unpack_file(file.file, file.file.with_name("u"), int)
    assert (
        file.file.with_name("u").read_bytes()
        == file.file.with_name("dense.safetensors").read_bytes()
    )
    with pytest.raises(NeuroalError, match="holds no tensor 'no'"):
        file.get_tensor("no")


@pytest.mark.parametrize("compress", [False, True])
def test_a_packed_file_is_a_safetensors_file(
    compress: bool, pack: Callable[..., PackedFile]
) -> None:
    file = pack(awkward(), compress)
    with safe_open(file.file, "pt") as opened:
        names = set(opened.keys())
        assert opened.metadata()["neuroal_packed"] == "1"
    assert names == awkward().keys() | {f"{n}:mask" for n in PACKED}
    for name, x in file.form.header.tensors.items():  # aligned, so that it can be mapped
        assert (file.form.header.data + x.start) % x.item == 0, name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_its_size_is_a_mask_and_what_survives(
    dtype: str, ratio: float, pack: Callable[..., PackedFile]
) -> None:
    weight = sparse(96, 128, dtype=FLOATS[dtype], ratio=ratio)
    (found,) = pack({"w": weight}).matrices()
    kept = int((weight != 0).sum())
    assert found.bytes == 96 * 128 // 8 + kept * weight.itemsize
    dense = found.dense
    (found,) = pack({"w": weight}, compress=True).matrices()
    assert found.bytes < 96 * 128 // 8 + kept * weight.itemsize < dense


def test_two_of_four_is_compressed_below_a_bit_a_weight(pack: Callable[..., PackedFile]) -> None:
    weight = sparse(256, 256, ratio=0)
    weight.view(-1, 4).scatter_(
        1, torch.rand(256 * 64, 4).argsort(1)[:, :2], 0
    )  # two of four, drawn
    file = pack({"w": weight}, compress=True)
    mask = file.form.mask("w")
    assert mask is not None and mask.size < 0.72 * 256 * 256 / 8  # log2(6) / 4 = 0.646 at best


@pytest.mark.parametrize("compress", [False, True])
def test_the_estimate_is_near(compress: bool, tmp_path: Path) -> None:
    save_file({"a": sparse(512, 300), "b": sparse(40, 40, ratio=0)}, tmp_path / "d")
    pack_file(tmp_path / "d", tmp_path / "p", compress, int)
    assert estimate(tmp_path / "d", compress) == pytest.approx(
        (tmp_path / "p").stat().st_size, rel=0.05
    )


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    save_file(awkward(), tmp_path / "d")
    for write, source, target in (
        (lambda a, b, t: pack_file(a, b, True, t), "d", "p"),
        (unpack_file, "p", "u"),
    ):
        seen: list[Any] = []
        write(tmp_path / source, tmp_path / target, seen.append)
        assert sum(seen) == sum(x.numel() * x.itemsize for x in awkward().values())


def test_a_frame_is_never_smaller_than_a_64th() -> None:
    for data in (bytes(6400), bytes(range(256)) * 25, zlib.compress(bytes(range(256)) * 9), b""):
        raw = codec.np.frombuffer(data, codec.np.uint8)
        frame = codec.compress(raw)
        assert 64 * len(frame) >= len(raw) >= len(frame)
        assert codec.decompress(frame, len(raw), "it").tobytes() == data


def test_an_ordinary_file_is_not_packed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    assert packed(tmp_path / "a.safetensors") is None
    assert same(load_file(tmp_path / "a.safetensors")["a"], torch.zeros(2, 2))

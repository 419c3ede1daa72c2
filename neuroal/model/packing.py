"""A folder packed and unpacked: weights file by file, the config marked, the rest copied."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal.errors import NeuroalError, UsageError
from neuroal.model import files, places
from neuroal.model.carry_over import OWN, WEIGHTS, files_of
from neuroal.model.files import Shards
from neuroal.packed import writing
from neuroal.packed.form import METHOD, VERSION
from neuroal.packed.reading import Stored, packed

CONFIG = "config.json"
# Written in front of a config's own entries: without it, the file is again what it was.
_MARK = (
    f'\n  "quantization_config": {{"quant_method": "{METHOD}", "version": "{VERSION}"}},'.encode()
)


@dataclass(frozen=True)
class Packing:
    """A packed folder.

    Attributes:
        dense: Bytes of its weights in files that are not packed.
        bytes: Bytes of its files of weights.
        matrices: How their tensors of at least two dimensions are stored.
        notes: What was left out.
    """

    dense: int
    bytes: int
    matrices: tuple[Stored, ...]
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> tuple[Stored, ...]:
        """The matrices that are packed."""
        return tuple(x for x in self.matrices if x.packed)

    @property
    def left(self) -> tuple[Stored, ...]:
        """The matrices that are there as they were: they would not have become smaller."""
        return tuple(x for x in self.matrices if not x.packed)

    def share(self) -> float:
        """Return the bytes of the packed matrices over those that they had; 1 without any."""
        had = sum(x.dense for x in self.packed)
        return sum(x.bytes for x in self.packed) / had if had else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "dense_bytes": self.dense,
            "packed_bytes": self.bytes,
            "matrices": self.of_matrices(),
            "notes": list(self.notes),
        }

    def of_matrices(self) -> dict[str, Any]:
        """Return what a report says of its matrices: see `Report.packing`."""
        return {
            "packed": len(self.packed),
            "dense_bytes": sum(x.dense for x in self.packed),
            "packed_bytes": sum(x.bytes for x in self.packed),
            "left_dense": {x.name: x.dense for x in self.left},
        }


def folder_of(model: str) -> Path:
    """Return the folder of a model that is to be packed or unpacked.

    Raises:
        UsageError: It is a hub name.
        NeuroalError: It is no model.
    """
    folder = places.local_folder(model)
    if folder is None:
        raise UsageError(
            f"'{model}' is no folder: download it first (hf download {model} --local-dir DIR)"
        )
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights, of any form."""
    return sorted({span.file for span in Shards(folder).ranges.values()})


def is_packed(folder: Path) -> bool:
    """Return whether any weights of a folder are packed."""
    return any(packed(file) is not None for file in weight_files(folder))


def check_packable(model: str, folder: Path) -> None:
    """Refuse to pack what is packed, or quantised, already.

    Raises:
        UsageError: It is packed.
        NeuroalError: It is quantised.
    """
    if is_packed(folder):
        raise UsageError(f"'{model}' is packed already: `neuroal unpack` gives its dense weights")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NeuroalError(f"cannot read '{folder / CONFIG}': {error}") from error
    if not isinstance(config, dict) or config.get("quantization_config"):
        raise NeuroalError(f"'{model}' is quantised: its weights have no zeros to leave out")


def pack_aside(folder: Path, aside: Path, compress: bool = False) -> None:
    """Write the packed form of a folder's weights into another folder, where they are not packed.

    Raises:
        NeuroalError: A file is broken.
    """
    aside.mkdir(parents=True, exist_ok=True)
    for file in weight_files(folder):
        if packed(file) is None:
            writing.pack_file(file, aside / file.name, compress, lambda _: None)
            (aside / file.name).chmod(file.stat().st_mode)


def take(folder: Path, aside: Path) -> Packing:
    """Put the packed weights of `pack_aside` in the place of a folder's own."""
    for file in weight_files(folder):
        if (aside / file.name).exists():
            os.replace(aside / file.name, file)
    _mark(folder)
    return packing_of(folder)


def packing_of(folder: Path, notes: tuple[str, ...] = ()) -> Packing:
    """Return what is in a packed folder, by the headers of its files."""
    dense = size = 0
    matrices: list[Stored] = []
    for file in weight_files(folder):
        opened = packed(file)
        dense += files.dense_bytes(file)
        size += file.stat().st_size
        matrices += () if opened is None else opened.matrices()
    return Packing(dense, size, tuple(matrices), notes)


def copy_rest(folder: Path, out: Path, *, mark: bool) -> tuple[str, ...]:
    """Copy what stands beside the weights, the config marked as packed or no longer so.

    Returns:
        A note on weights in other formats, which are not copied.

    Raises:
        NeuroalError: The config cannot be marked, or its mark is not found.
    """
    others, weights = [], weight_files(folder)
    for file in files_of(folder):
        name = file.relative_to(folder)
        beside = str(name) in OWN or (len(name.parts) > 1 and file.suffix == ".safetensors")
        if beside or file.suffix not in WEIGHTS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
        elif file not in weights:
            others.append(str(name))
    (_mark if mark else _unmark)(out)
    if not others:
        return ()
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return (f"not copied, since it holds weights in another format: {others[0]}{more}",)


def _mark(folder: Path) -> None:
    data = (folder / CONFIG).read_bytes()
    if not data.startswith(b"{"):
        raise NeuroalError(f"'{folder / CONFIG}' is no JSON object")
    if not data.startswith(b"{" + _MARK):
        files.write_atomically(folder / CONFIG, b"{" + _MARK + data[1:])


def _unmark(folder: Path) -> None:
    data = (folder / CONFIG).read_bytes()
    if not data.startswith(b"{" + _MARK):
        raise NeuroalError(f"'{folder / CONFIG}' does not begin as `neuroal pack` has it")
    files.write_atomically(folder / CONFIG, b"{" + data[1 + len(_MARK) :])

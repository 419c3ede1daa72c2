"""Files of models and runs: single tensors of safetensors files, fingerprints, reports."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuroal.errors import NeuroalError, UsageError
from neuroal.model.places import local_folder
from neuroal.model.report_form import check_report
from neuroal.packed import header as headers
from neuroal.packed.header import DTYPES as DTYPES
from neuroal.packed.reading import packed
from neuroal.units import size

MARKER = "neuroal.json"
SCHEMA = 1
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECE = 4 << 20


@dataclass(frozen=True)
class FileRange:
    """The bytes of a file that a tensor takes.

    Attributes:
        file: The file.
        start: Its first byte in the file.
        end: Where it ends.
        size: Bytes of the tensor; more than are here where these are its surviving values.
    """

    file: Path
    start: int
    end: int
    size: int

    @property
    def packed(self) -> bool:
        """Whether the bytes are its surviving values alone."""
        return self.size > self.end - self.start


class Shards:
    """The safetensors files of a model folder.

    Attributes:
        folder: The folder.
        ranges: Of every tensor, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self.ranges: dict[str, FileRange] = {}
        listed = _listed(folder)
        files = weight_files(folder)
        if not files:
            raise NeuroalError(f"folder '{folder}' holds no {ONE} and no {INDEX}")
        for file in files:
            self._open[file] = open_file(file)
            self.ranges |= self.header(file)
        for name, file in listed.items():
            if name not in self.ranges or self.ranges[name].file != file:
                raise NeuroalError(f"'{file}' lacks the tensor '{name}' that {INDEX} names")
        if listed:
            self.ranges = {name: self.ranges[name] for name in listed}

    @staticmethod
    def header(file: Path) -> dict[str, FileRange]:
        """Return the range of every tensor of a file, as its first bytes say."""
        opened = packed(file)
        header = headers.read(file) if opened is None else opened.form.header
        dense = header if opened is None else opened.form.dense
        ranges = {}
        for name, x in dense.tensors.items():
            here = header.tensors[name]
            start, end = header.data + here.start, header.data + here.end
            ranges[name] = FileRange(file, start, end, x.size)
        return ranges

    def dtype(self) -> torch.dtype:
        """Return the dtype of the first floating tensor."""
        for name in self.ranges:
            part = self._open[self.ranges[name].file].get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is not None and dtype.is_floating_point:
                return dtype
        raise NeuroalError(f"folder '{self.folder}' holds no floating tensor")

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self._open[self.ranges[name].file].get_tensor(name)
        return tensor

    def slices(self, names: Iterable[str]) -> dict[str, Any]:
        """Return slices by tensor name; a slice is read when it is indexed."""
        return {name: self._open[self.ranges[name].file].get_slice(name) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Bring tensors into the operating system's file cache; this process keeps none of them."""
        buffer = memoryview(bytearray(_PIECE))
        for span in sorted((self.ranges[n] for n in names), key=lambda r: (r.file, r.start)):
            with span.file.open("rb", buffering=0) as stream:
                stream.seek(span.start)
                left = span.end - span.start
                while left > 0 and (read := stream.readinto(buffer[: min(left, _PIECE)])):
                    left -= read


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a model's folder is loaded from; empty without any.

    Raises:
        NeuroalError: Its index is damaged, or names a file that is not in the folder.
    """
    if (folder / ONE).is_file():
        return [folder / ONE]
    return sorted(set(_listed(folder).values()))


def _listed(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor that the index names; empty for a single file."""
    index = folder / INDEX
    if (folder / ONE).is_file() or not index.is_file():
        return {}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): folder / str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise NeuroalError(f"'{index}' is no index of safetensors files: {error}") from error
    for file in listed.values():
        place = file.relative_to(folder) if file.is_relative_to(folder) else file
        if place.is_absolute() or ".." in place.parts:
            raise NeuroalError(f"'{index}' names '{place}', which is outside the folder")
        if not file.is_file():
            raise NeuroalError(f"'{index}' names '{file.name}', which is not there")
    return listed


def open_file(file: Path) -> Any:
    """Open a safetensors file, packed or not, without mapping it into memory where that can be.

    Raises:
        NeuroalError: It is broken.
    """
    opened = packed(file)
    if opened is not None:
        return opened
    try:
        try:  # a map of the whole file into memory might exceed a limit of the process
            return safe_open(file, framework="pt", backend="pread")
        except TypeError:  # safetensors before 0.8
            return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise NeuroalError(f"cannot read '{file}': {error}") from error


def fingerprint(model: str) -> str | None:
    """Return the SHA-256 over a folder's config, index and weights; None for a hub name."""
    folder = local_folder(model)
    if folder is None:
        return None
    digest = hashlib.sha256()
    weights = weight_files(folder)
    index = [] if folder / ONE in weights or not weights else [folder / INDEX]
    for file in [folder / "config.json", *index, *weights]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file.

    Raises:
        NeuroalError: The file does not exist or is broken.
    """
    try:
        with open_file(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise NeuroalError(f"cannot read '{path}': {error}") from error


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's safetensors files, unpacked."""
    return sum(dense_bytes(file) for file in weight_files(folder))


def dense_bytes(file: Path) -> int:
    """Return the bytes of a safetensors file, unpacked if it is packed."""
    opened = packed(file)
    return file.stat().st_size if opened is None else opened.form.dense.size


def read_report(path: Path, needed: Collection[str] | None = None) -> dict[str, Any]:
    """Return the JSON of a `neuroal.json`, given the file or its folder.

    Args:
        path: The file or its folder.
        needed: The parts that may not be missing, as in `check_report`; where there are none it may
            be a recipe alone.

    Raises:
        UsageError: There is none, it is broken, or of another schema.
    """
    file = path / MARKER if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read recipe '{file}': {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"recipe '{file}' is not a JSON object")
    if data.get("schema", SCHEMA) != SCHEMA:
        raise UsageError(f"'{file}' has schema {data['schema']!r:.20}, this neuroal reads {SCHEMA}")
    if needed is None or "schema" in data:
        check_report(file, data, needed)
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent, whenever the process ends."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to start if the disk of a folder has less than `needed` bytes free."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise NeuroalError(f"'{folder}' needs {size(needed)} of disk, {size(free)} are free")

"""The masks of a run without its weights: one bit a weight, compressed, in a safetensors file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.errors import NeuroalError
from neuroal.model.files import load_tensors, open_file

FILE = "masks.safetensors"
FORMAT = "neuroal masks 1"


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks by linear name, packed, and the run that they are from.

    Attributes:
        packed: uint8, what zlib makes of the bits of the mask in row order, 1 where it prunes.
        shapes: `(out, in)` of every mask.
        run: Entries of the run's report: recipe, model, plugins, data and more.
    """

    packed: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    run: Mapping[str, Any]

    def mask(self, name: str) -> Tensor:
        """Return a linear's mask, bool `(out, in)`, True = pruned.

        Raises:
            NeuroalError: It is broken.
        """
        rows, columns = self.shapes[name]
        try:
            data = zlib.decompress(self.packed[name].numpy().tobytes())
            bits = np.unpackbits(np.frombuffer(data, np.uint8), count=rows * columns)
        except (zlib.error, ValueError) as error:
            raise NeuroalError(f"mask of '{name}' is broken: {error}") from error
        if len(data) != (rows * columns + 7) // 8:
            raise NeuroalError(f"mask of '{name}' is broken: it has {len(data)} bytes")
        return torch.from_numpy(bits.reshape(rows, columns)).bool()


def pack(mask: Tensor) -> Tensor:
    """Return a mask `(out, in)` as `Masks.packed` holds it."""
    bits = np.packbits(mask.cpu().numpy())
    return torch.frombuffer(bytearray(zlib.compress(bits.tobytes())), dtype=torch.uint8)


def to_bytes(masks: Masks) -> bytes:
    """Return `masks.safetensors`."""
    told = {"format": FORMAT, "shapes": json.dumps(masks.shapes), "run": json.dumps(masks.run)}
    return to_safetensors(dict(masks.packed), metadata=told)


def read(path: Path) -> Masks:
    """Return the masks of a file.

    Raises:
        NeuroalError: It cannot be read, or holds something else.
    """
    packed = load_tensors(path)
    with open_file(path) as file:
        told = file.metadata() or {}
    if told.get("format") != FORMAT:
        raise NeuroalError(f"'{path}' holds no masks: its format is {told.get('format')!r:.40}")
    try:
        read = json.loads(told["shapes"]), json.loads(told["run"])
        shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in read[0].items()}
        run = dict(read[1])
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        raise NeuroalError(f"'{path}' is broken: what it says of its run is damaged") from error
    if shapes.keys() != packed.keys():
        wrong = min(shapes.keys() ^ packed.keys())
        raise NeuroalError(f"'{path}' is broken: '{wrong}' has a shape or a mask alone")
    return Masks(packed, shapes, run)

"""Outcomes as bytes: for the journal, and for other processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.alignment import Outcome
from neuroal.hookspecs import Measurement

_KEY = "measurements"


def pack(outcomes: Sequence[Outcome]) -> bytes:
    """Return outcomes as a safetensors file: deviations as tensors, the rest as metadata."""
    tensors = {
        f"{i}/{name}": t.cpu().contiguous()
        for i, o in enumerate(outcomes)
        for name, t in o.deviation.items()
    }
    measurements = json.dumps([asdict(o.measurement) for o in outcomes])
    return to_safetensors(tensors, metadata={_KEY: measurements})


def unpack(data: bytes) -> list[Outcome]:
    """Return the outcomes of `pack`."""
    size = int.from_bytes(data[:8], "little")
    measurements = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_KEY])
    deviations: list[dict[str, Tensor]] = [{} for _ in measurements]
    for name, tensor in from_safetensors(data).items():
        index, _, linear = name.partition("/")
        deviations[int(index)][linear] = tensor
    return [Outcome(Measurement(**m), d) for m, d in zip(measurements, deviations, strict=True)]

"""A candidate to measure, and its outcome; as bytes for the journal and for other processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neuroal.types import Measurement, Target

_KEY = "measurements"


@dataclass(frozen=True)
class Trial:
    """One candidate to measure.

    Attributes:
        targets: How much to prune in every linear.
        limit: A finished total of the same step; the candidate leaves as soon as it is strictly
            above. None measures to the end.
        first: Targets of the first trial of a generation that reuses its weights (of this one, if
            it is the first): a block with the same targets keeps the weights that the first trial
            has there, though its inputs are others, and is not pruned again.
    """

    targets: Mapping[str, Target]
    limit: float | None = None
    first: Mapping[str, Target] | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """A measured candidate.

    Attributes:
        measurement: Its cost.
        deviation: Dense minus pruned input norm, float32 `(in,)`, by linear; if asked for.
    """

    measurement: Measurement
    deviation: Mapping[str, Tensor]


def pack(outcomes: Sequence[Outcome]) -> bytes:
    """Return outcomes as a safetensors file: deviations as tensors, the rest as metadata."""
    tensors = _on_the_host(
        {f"{i}/{name}": t for i, o in enumerate(outcomes) for name, t in o.deviation.items()}
    )
    measurements = json.dumps([asdict(o.measurement) for o in outcomes])
    return to_safetensors(tensors, metadata={_KEY: measurements})


def _on_the_host(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of vectors on the CPU, of one dtype; waits for their device once."""
    if not vectors:
        return {}
    together = torch.cat(list(vectors.values())).cpu()
    parts = torch.split(together, [len(t) for t in vectors.values()])
    return {name: part.clone() for name, part in zip(vectors, parts, strict=True)}


def unpack(data: bytes) -> list[Outcome]:
    """Return the outcomes of `pack`."""
    size = int.from_bytes(data[:8], "little")
    measurements = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_KEY])
    deviations: list[dict[str, Tensor]] = [{} for _ in measurements]
    for name, tensor in from_safetensors(data).items():
        index, _, linear = name.partition("/")
        deviations[int(index)][linear] = tensor
    return [Outcome(Measurement(**m), d) for m, d in zip(measurements, deviations, strict=True)]

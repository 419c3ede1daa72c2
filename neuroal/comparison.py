"""Two runs, or allocations, side by side: ratios, masks, recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from neuroal import weights as matrices
from neuroal.allocation import FILE, load
from neuroal.checkpoint import MARKER, read_report
from neuroal.errors import NeuroalError, UsageError
from neuroal.layout import Block, Layout

Masks = Mapping[str, int]
"""A linear's mask by name, as the bits of one number: 1 = pruned, row by row."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two that are compared.

    Attributes:
        name: The folder or file as it was given.
        report: Content of a run's `neuroal.json`; None for an allocation alone.
        ratios: Of every linear, in order: achieved by a run, wanted by an allocation alone.
        wanted: Of every linear, as the allocation has them.
    """

    name: str
    report: Mapping[str, Any] | None
    ratios: Mapping[str, float]
    wanted: Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
    """How far two masks agree; the agreements of linears add up.

    Attributes:
        both: How many weights both prune.
        either: How many at least one prunes.
        equal: How many both prune or both keep.
        weights: How many there are.
    """

    both: int = 0
    either: int = 0
    equal: int = 0
    weights: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.both + other.both,
            self.either + other.either,
            self.equal + other.equal,
            self.weights + other.weights,
        )

    @property
    def overlap(self) -> float:
        """Intersection over union of what is pruned; 1 where neither prunes anything."""
        return self.both / self.either if self.either else 1.0

    @property
    def share(self) -> float:
        """Share of the weights that both treat alike."""
        return self.equal / self.weights

    def to_json(self) -> dict[str, float]:
        """Return both numbers."""
        return {"intersection_over_union": self.overlap, "equal_share": self.share}


@dataclass(frozen=True, eq=False)
class Line:
    """Ratios and masks of a linear, of a block, or of everything.

    Attributes:
        name: Of the linear or block.
        a: Ratio of the first side.
        b: Ratio of the second side.
        masks: None where a side has no weights.
        linears: A block's lines.
    """

    name: str
    a: float
    b: float
    masks: Agreement | None = None
    linears: tuple[Line, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, a block with its linears."""
        found: dict[str, Any] = {"name": self.name, "a": self.a, "b": self.b}
        if self.masks is not None:
            found["masks"] = self.masks.to_json()
        if self.linears:
            found["linears"] = [x.to_json() for x in self.linears]
        return found


def read_side(text: str) -> Side:
    """Read a run's report, or an allocation.

    Args:
        text: A run's folder, or an `allocation.safetensors`.

    Raises:
        UsageError: It is neither, or a report of another schema.
        NeuroalError: A file of it is broken.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / MARKER).is_file():
            raise UsageError(f"folder '{text}' is no run: it holds no {MARKER}")
        report = read_report(path)
        try:
            ratios = {name: float(x["achieved"]) for name, x in report["linears"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"'{path / MARKER}' is no report of a run: {error!r}") from error
        return Side(text, report, ratios, _allocation(path / FILE))
    if not path.is_file():
        raise UsageError(f"'{text}' is neither a run's folder nor an {FILE}")
    wanted = _allocation(path)
    return Side(text, None, wanted, wanted)


def _allocation(file: Path) -> dict[str, float]:
    tensors, _ = load(file)
    for name, ratios in tensors.items():
        valid = ratios.dim() == 1 and ratios.is_floating_point()
        if not valid or not bool(((ratios >= 0) & (ratios <= 1)).all()):
            raise UsageError(f"'{file}' is no allocation: '{name}' is no ratio of a linear")
    return {name: float(ratios.mean()) for name, ratios in tensors.items()}


def check_comparable(a: Side, b: Side) -> None:
    """Refuse two sides of different models.

    Raises:
        UsageError: Linears, or the files of the dense models, differ.
    """
    for one, other in ((a, b), (b, a)):
        for name in one.wanted:
            if name not in other.wanted:
                raise UsageError(
                    f"'{a.name}' and '{b.name}' are of different models: only '{one.name}' has "
                    f"the linear '{name}'"
                )
    if a.report is None or b.report is None:
        return
    models = [x.report["model"] for x in (a, b) if x.report is not None]
    if models[0].get("sha256") != models[1].get("sha256"):
        raise UsageError(
            f"'{a.name}' and '{b.name}' are of different models: '{models[0].get('name')}' and "
            f"'{models[1].get('name')}' do not hold the same weights"
        )


def masks_of(model: nn.Module, layout: Layout) -> dict[str, int]:
    """Return the zeros of every linear of a model in memory."""
    found = {}
    for name, linear in layout.linears.items():
        zero = (matrices.weight(linear, model) == 0).cpu().numpy()
        found[name] = int.from_bytes(np.packbits(zero).tobytes())
    return found


def agreement(one: int, other: int, count: int) -> Agreement:
    """Compare two masks of `count` bits."""
    return Agreement(
        both=(one & other).bit_count(),
        either=(one | other).bit_count(),
        equal=count - (one ^ other).bit_count(),
        weights=count,
    )


def lines(
    a: Side, b: Side, layout: Layout | None = None, masks: tuple[Masks, Masks] | None = None
) -> list[Line]:
    """Return a line per block, each with one per linear.

    Args:
        a: One side.
        b: The other; `check_comparable` has passed.
        layout: Of their model; without it blocks are told by the linears' names, and the ratio of
            a block is the mean over its linears, not over its weights.
        masks: Of both, where both have weights.
    """
    achieved = a.report is not None and b.report is not None
    first, second = (a.ratios, b.ratios) if achieved else (a.wanted, b.wanted)
    found = []
    for name, members in _blocks(a, layout).items():
        parts = []
        for linear, weights in members.items():
            agreed = None
            if masks is not None:
                agreed = agreement(masks[0][linear], masks[1][linear], weights)
            parts.append(Line(linear, first[linear], second[linear], agreed))
        found.append(_together(name, parts, list(members.values())))
    return found


def overall(blocks: list[Line], layout: Layout | None = None) -> Line:
    """Return one line for all blocks together."""
    weights = [1] * len(blocks) if layout is None else [x.weights for x in layout.blocks]
    line = _together("all blocks", blocks, weights)
    return Line(line.name, line.a, line.b, line.masks)


def _together(name: str, parts: list[Line], weights: list[int]) -> Line:
    total = sum(weights)
    agreed = [x.masks for x in parts if x.masks is not None]
    return Line(
        name,
        sum(x.a * n for x, n in zip(parts, weights, strict=True)) / total,
        sum(x.b * n for x, n in zip(parts, weights, strict=True)) / total,
        sum(agreed, Agreement()) if agreed else None,
        tuple(parts),
    )


def _blocks(side: Side, layout: Layout | None) -> dict[str, dict[str, int]]:
    """Return the weights of every linear by block; 1 each where nobody says."""
    if layout is not None:
        return {x.name: _sizes(x) for x in layout.blocks}
    found: dict[str, dict[str, int]] = {}
    for linear in side.wanted:
        parts = linear.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        found.setdefault(".".join(parts[: number + 1]), {})[linear] = 1
    return found


def _sizes(block: Block) -> dict[str, int]:
    return {x.name: x.weights for x in block.linears}


def differences(a: Side, b: Side) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two runs were asked for differently: key, one value, the other.

    The keys are a recipe's, then the hashes of what a recipe only names.
    """
    if a.report is None or b.report is None:
        return
    one, other = a.report.get("recipe", {}), b.report.get("recipe", {})
    for key in dict.fromkeys([*one, *other]):
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)
    for key, first in _hashes(a.report).items():
        second = _hashes(b.report).get(key, first)
        if first != second:
            yield key, first, second


def _hashes(report: Mapping[str, Any]) -> dict[str, Any]:
    found = {f"{x['role']} {x['name']} sha256": x.get("sha256") for x in report.get("plugins", ())}
    if report.get("data"):
        found["calibration sha256"] = report["data"].get("sha256")
    return found


def check_layout(side: Side, layout: Layout) -> None:
    """Refuse a run whose report is not of the model in its folder.

    Raises:
        NeuroalError: The linears differ.
    """
    wrong = side.wanted.keys() ^ layout.linears.keys()
    if wrong:
        raise NeuroalError(f"report and model of '{side.name}' differ in linear '{min(wrong)}'")

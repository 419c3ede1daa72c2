"""Two runs, or allocations, side by side: ratios, masks, recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation.mask_overlap import MaskOverlap, Masks, agreement
from neuroal.evaluation.quality import same_text
from neuroal.layout import Block, Layout
from neuroal.model.files import MARKER, read_report
from neuroal.pruning.allocation import FILE, importance_problem, load
from neuroal.types import Importance

Entry = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ComparedSide:
    """One of the two that are compared.

    Attributes:
        name: The folder or file as it was given.
        report: Content of a run's `neuroal.json`; None for an allocation alone.
        ratios: Of every linear, in order: achieved by a run, wanted by an allocation alone.
        wanted: Of every linear, as the allocation has them.
        rows: Of every linear, float64 `(out,)`, or `(1,)` where its rows have one ratio.
        importance: Of the linears that have it, float64.
    """

    name: str
    report: Mapping[str, Any] | None
    ratios: Mapping[str, float]
    wanted: Mapping[str, float]
    rows: Mapping[str, Tensor]
    importance: Mapping[str, Importance]

    @property
    def by_row(self) -> bool:
        """Return whether rows have ratios of their own."""
        return any(len(x) > 1 for x in self.rows.values())

    def sizes(self, linear: str) -> tuple[int, int]:
        """Return how many rows and inputs of a linear have values of their own."""
        importance = self.importance.get(linear)
        if importance is None:
            return len(self.rows[linear]), 0
        inputs = 0 if importance.inputs is None else len(importance.inputs)
        return max(len(self.rows[linear]), len(importance.rows)), inputs


@dataclass(frozen=True, eq=False)
class Line:
    """Ratios and masks of a linear, of a block, or of everything.

    Attributes:
        name: Of the linear or block.
        a: Ratio of the first side.
        b: Ratio of the second side.
        masks: None where a side has no weights.
        rows: Mean over rows of how far the wanted ratios of a row are apart; None where no side has
            ratios of rows.
        importance: The factor by which the importance of a weight, that of its row times that of
            its input, differs, in root mean square of logarithms: 1 where proportions within
            linears agree, which are all that counts; None where no side has importance. Rows and
            inputs without count alike.
        linears: A block's lines.
    """

    name: str
    a: float
    b: float
    masks: MaskOverlap | None = None
    rows: float | None = None
    importance: float | None = None
    linears: tuple[Line, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, a block with its linears."""
        values: dict[str, Any] = {"name": self.name, "a": self.a, "b": self.b}
        if self.masks is not None:
            values["masks"] = self.masks.to_json()
        if self.rows is not None:
            values["rows_apart"] = self.rows
        if self.importance is not None:
            values["importance_apart"] = self.importance
        if self.linears:
            values["linears"] = [x.to_json() for x in self.linears]
        return values


def read_side(text: str) -> ComparedSide:
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
        ratios = {name: float(x["achieved"]) for name, x in report["linears"].items()}
        return _side(text, report, ratios, path / FILE)
    if not path.is_file():
        raise UsageError(f"'{text}' is neither a run's folder nor an {FILE}")
    return _side(text, None, None, path)


def _side(
    name: str, report: Mapping[str, Any] | None, achieved: Mapping[str, float] | None, file: Path
) -> ComparedSide:
    rows, importance = load(file)
    for linear, ratios in rows.items():
        if not _is_vector(ratios) or not bool(((ratios >= 0) & (ratios <= 1)).all()):
            raise UsageError(f"'{file}' is no allocation: '{linear}' is no ratio of a linear")
    for linear, weighed in importance.items():
        for what, values in (("rows", weighed.rows), ("inputs", weighed.inputs)):
            known = values is None or (_is_vector(values) and not importance_problem(values))
            if linear not in rows or not known:
                raise UsageError(
                    f"'{file}' is no allocation: '{linear}' has no importance of {what}"
                )
    wanted = {linear: float(ratios.mean()) for linear, ratios in rows.items()}
    return ComparedSide(
        name,
        report,
        ratios=wanted if achieved is None else achieved,
        wanted=wanted,
        rows={linear: x.double() for linear, x in rows.items()},
        importance={linear: _double(x) for linear, x in importance.items()},
    )


def _double(importance: Importance) -> Importance:
    inputs = None if importance.inputs is None else importance.inputs.double()
    return Importance(importance.rows.double(), inputs)


def _is_vector(values: Tensor) -> bool:
    return values.dim() == 1 and len(values) > 0 and values.is_floating_point()


def check_comparable(a: ComparedSide, b: ComparedSide) -> None:
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
    for name in a.wanted:
        for what, *both in zip(("rows", "inputs"), a.sizes(name), b.sizes(name), strict=True):
            sizes = sorted({*both} - {0} - ({1} if what == "rows" else set()))
            if len(sizes) > 1:
                raise UsageError(
                    f"'{a.name}' and '{b.name}' are of different models: linear '{name}' has "
                    f"{sizes[0]} or {sizes[1]} {what}"
                )
    if a.report is None or b.report is None:
        return
    models = [x.report["model"] for x in (a, b) if x.report is not None]
    if models[0].get("sha256") != models[1].get("sha256"):
        raise UsageError(
            f"'{a.name}' and '{b.name}' are of different models: '{models[0].get('name')}' and "
            f"'{models[1].get('name')}' do not hold the same weights"
        )


def lines(
    a: ComparedSide,
    b: ComparedSide,
    layout: Layout | None = None,
    masks: tuple[Masks, Masks] | None = None,
) -> list[Line]:
    """Return a line per block, each with one per linear.

    Args:
        a: One side.
        b: The other; `check_comparable` has passed.
        layout: Of their model; without it blocks are found from the linears' names, and the ratio
            of a block is the mean over its linears, not over its weights.
        masks: Of both, where both have weights.
    """
    achieved = a.report is not None and b.report is not None
    first, second = (a.ratios, b.ratios) if achieved else (a.wanted, b.wanted)
    blocks = []
    for name, members in _blocks(a, layout).items():
        parts = []
        for linear, weights in members.items():
            agreed = None
            if masks is not None:
                agreed = agreement(masks[0][linear], masks[1][linear], weights)
            apart = _rows_apart(a, b, linear), _importance_apart(a, b, linear)
            parts.append(Line(linear, first[linear], second[linear], agreed, *apart))
        blocks.append(_together(name, parts, list(members.values())))
    return blocks


def overall(blocks: list[Line], layout: Layout | None = None) -> Line:
    """Return one line for all blocks together."""
    weights = [1] * len(blocks) if layout is None else [x.weights for x in layout.blocks]
    return replace(_together("all blocks", blocks, weights), linears=())


def _rows_apart(a: ComparedSide, b: ComparedSide, linear: str) -> float | None:
    if not (a.by_row or b.by_row):
        return None
    return float((a.rows[linear] - b.rows[linear]).abs().mean())


def _importance_apart(a: ComparedSide, b: ComparedSide, linear: str) -> float | None:
    if not (a.importance or b.importance):
        return None
    alike = Importance(torch.ones(1, dtype=torch.float64))
    one, other = a.importance.get(linear, alike), b.importance.get(linear, alike)
    variance = 0.0  # over all weights: row and input vary independently
    for first, second in ((one.rows, other.rows), (one.inputs, other.inputs)):
        apart = (alike.rows if first is None else first).log()
        apart = apart - (alike.rows if second is None else second).log()
        variance += float(apart.var(correction=0))
    return math.exp(math.sqrt(variance))


def _together(name: str, parts: list[Line], weights: list[int]) -> Line:
    total = sum(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(x * n for x, n in zip(values, weights, strict=True)) / total

    agreed = [x.masks for x in parts if x.masks is not None]
    rows = [x.rows for x in parts if x.rows is not None]
    squares = [math.log(x.importance) ** 2 for x in parts if x.importance is not None]
    return Line(
        name,
        mean(x.a for x in parts),
        mean(x.b for x in parts),
        sum(agreed, MaskOverlap()) if agreed else None,
        mean(rows) if rows else None,
        math.exp(math.sqrt(mean(squares))) if squares else None,
        tuple(parts),
    )


def _blocks(side: ComparedSide, layout: Layout | None) -> dict[str, dict[str, int]]:
    """Return the weights of every linear by block; 1 each without a layout."""
    if layout is not None:
        return {x.name: _sizes(x) for x in layout.blocks}
    blocks: dict[str, dict[str, int]] = {}
    for linear in side.wanted:
        parts = linear.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        blocks.setdefault(".".join(parts[: number + 1]), {})[linear] = 1
    return blocks


def _sizes(block: Block) -> dict[str, int]:
    return {x.name: x.weights for x in block.linears}


def differences(a: ComparedSide, b: ComparedSide) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two runs were asked for differently: key, one value, the other.

    The keys are a recipe's, then those of the settings by which a run was fine-tuned, then the
    hashes of what a recipe only names.
    """
    if a.report is None or b.report is None:
        return
    one, other = a.report.get("recipe", {}), b.report.get("recipe", {})
    for key in dict.fromkeys([*one, *other]):
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)
    tuned, otherwise = ((x.get("training") or {}).get("settings", {}) for x in (a.report, b.report))
    for key in dict.fromkeys([*tuned, *otherwise]):
        first, second = tuned.get(key), otherwise.get(key)
        if first != second and (first or second):  # what is not asked for says nothing
            yield f"training {key}", first, second
    for key, first in _hashes(a.report).items():
        second = _hashes(b.report).get(key, first)
        if first != second:
            yield key, first, second


def evaluations(a: ComparedSide, b: ComparedSide) -> list[tuple[Entry | None, Entry | None]]:
    """Return what two runs have kept of their evaluations (see `quality.entry`), text by text.

    Entries stand side by side where tokens and dtype are the same; a text that only one run was
    evaluated on has None on the other side.
    """
    first, second = ([] if x.report is None else x.report.get("evaluation", ()) for x in (a, b))
    left = list(second)
    pairs: list[tuple[Entry | None, Entry | None]] = []
    for entry in first:
        other = next((x for x in left if same_text(entry, x)), None)
        if other is not None:
            left.remove(other)
        pairs.append((entry, other))
    return [*pairs, *((None, x) for x in left)]


def _hashes(report: Mapping[str, Any]) -> dict[str, Any]:
    hashes = {f"{x['role']} {x['name']} sha256": x.get("sha256") for x in report.get("plugins", ())}
    if report.get("data"):
        hashes["calibration sha256"] = report["data"].get("sha256")
    return hashes


def check_layout(side: ComparedSide, layout: Layout) -> None:
    """Refuse a run whose report is not of the model in its folder.

    Raises:
        NeuroalError: The linears differ.
    """
    wrong = side.wanted.keys() ^ layout.linears.keys()
    if wrong:
        raise NeuroalError(f"report and model of '{side.name}' differ in linear '{min(wrong)}'")

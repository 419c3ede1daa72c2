"""Two runs, or allocations, of one model compared: ratios, and of runs masks and perplexities."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from neuroal.errors import UsageError
from neuroal.evaluation import comparison
from neuroal.evaluation.comparison import ComparedSide, Line
from neuroal.evaluation.mask_overlap import Masks, masks_of
from neuroal.evaluation.perplexity import Perplexity, perplexity, windows_for
from neuroal.layout import Layout, find
from neuroal.model import memory, pretrained
from neuroal.types import Bos


@dataclass(frozen=True)
class MeasuredRun:
    """What a run's model says; its perplexity only where a text is given."""

    masks: Masks
    layout: Layout
    perplexity: Perplexity | None


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two runs, or allocations, of one model side by side.

    Attributes:
        a: The first.
        b: The second.
        runs: What the models of two runs say; empty where one side is an allocation alone.
        blocks: Of every block, each with its linears.
        overall: Of everything.
    """

    a: ComparedSide
    b: ComparedSide
    runs: tuple[MeasuredRun, ...]
    blocks: tuple[Line, ...]
    overall: Line

    def __repr__(self) -> str:
        """Return both names, their ratios, and how far their masks agree."""
        line = self.overall
        masks = "" if line.masks is None else f", masks overlap by {line.masks.overlap:.4f}"
        return f"Comparison({self.a.name}: {line.a:.4f}, {self.b.name}: {line.b:.4f}{masks})"

    def records(self) -> list[dict[str, Any]]:
        """Return a flat dict for each linear, as `pandas.DataFrame` takes them."""
        rows = []
        for block in self.blocks:
            for line in block.linears:
                values = line.to_json()
                masks = values.pop("masks", {})
                rows.append({"block": block.name, "linear": values.pop("name")} | values | masks)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = {"a": self.a.name, "b": self.b.name}
        values["ratios"] = "achieved" if self.runs else "wanted"
        values["differences"] = {
            key: {"a": one, "b": other}
            for key, one, other in comparison.differences(self.a, self.b)
        }
        kept = [dict(zip("ab", x, strict=True)) for x in comparison.evaluations(self.a, self.b)]
        if kept:
            values["evaluation"] = kept
        perplexities = [x.perplexity.to_json() for x in self.runs if x.perplexity is not None]
        if perplexities:
            values["perplexity"] = dict(zip("ab", perplexities, strict=True))
        values["overall"] = self.overall.to_json()
        return values | {"blocks": [x.to_json() for x in self.blocks]}


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: str | None = None,
    length: int | None = None,
    windows: int | None = None,
    bos: Bos = "auto",
    pack_documents: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compare two runs, or two allocations, of one model.

    Args:
        a: Folder of a run, or an `allocation.safetensors`.
        b: The other.
        data: A text to measure the perplexity of both runs on; None measures none.
        length: Tokens per window; None is the smaller of 2048 and the model's context.
        windows: At most so many; None is all.
        bos: Whether windows begin with the beginning-of-sequence token: as in `Recipe`.
        pack_documents: Whether documents are joined by the end-of-sequence token: as in `Recipe`.
        device: Where the models run.
        dtype: Dtype to load them in.
        trust_remote_code: Let the models' own code run.
        progress: Show progress bars.

    Raises:
        UsageError: One is neither, they are of different models, or a text is given for an
            allocation.
        NeuroalError: A file is broken, or the text cannot be read.
    """
    if data is None and (length or windows):
        raise UsageError("length and windows are for data, which is not given")
    sides = comparison.read_side(str(a)), comparison.read_side(str(b))
    comparison.check_comparable(*sides)
    alone = next((side.name for side in sides if side.report is None), None)
    if data is not None and alone is not None:
        raise UsageError(f"--data needs two runs: '{alone}' is an allocation alone")
    runs: tuple[MeasuredRun, ...] = ()
    if alone is None:
        cut = partial(
            windows_for,
            length=length,
            windows=windows,
            bos=bos,
            pack_documents=pack_documents,
            progress=progress,
        )
        runs = tuple(
            _measured(side, data, cut, device, dtype, trust_remote_code, progress) for side in sides
        )
    layout = runs[0].layout if runs else None
    masks = (runs[0].masks, runs[1].masks) if runs else None
    blocks = comparison.lines(*sides, layout, masks)
    return Comparison(*sides, runs, tuple(blocks), comparison.overall(blocks, layout))


def _measured(
    side: ComparedSide,
    data: str | None,
    cut: Any,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: bool,
) -> MeasuredRun:
    """Load a run's model once, for its masks and its perplexity."""
    place = memory.device_of(device)
    windows = None
    if data is not None:
        config = pretrained.load_config(side.name, trust_remote_code)
        if dtype == "auto":
            dtype = pretrained.dtype_to_measure(side.name, config, place)
        windows = cut(config, data, pretrained.load_tokenizer(side.name, trust_remote_code))
    model, _ = pretrained.load(side.name, place, dtype, trust_remote_code)
    layout = find(model)
    comparison.check_layout(side, layout)
    read = None if windows is None else perplexity(model, windows, progress=progress)
    return MeasuredRun(masks_of(model, layout), layout, read)

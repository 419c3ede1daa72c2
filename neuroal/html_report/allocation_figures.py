"""The figures of what was pruned where: every linear, every row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuroal.html_report.drawing import INK, PAPER, SCHEME, SERIES
from neuroal.html_report.figure import HALF, Figure, Spec, Table, TableValue, fitted
from neuroal.html_report.reading import FinishedRun, is_wide, local
from neuroal.units import percent

_MANY_KINDS = 48
_NUMBER = re.compile(r"\.\d+\.")
_BINS = 48
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def _places(run: FinishedRun) -> dict[str, tuple[int, str]]:
    """Return block and kind of every linear, in order of execution.

    The kind is the name within the block; where there are many, as with experts, one stands for all
    that differ in a number alone.
    """
    places = {name: local(name, run.report) for name in run.report["linears"]}
    if len({kind for _, kind in places.values()}) > _MANY_KINDS:
        return {n: (block, _NUMBER.sub(".*.", kind)) for n, (block, kind) in places.items()}
    return places


@dataclass(frozen=True)
class _MapCell:
    """One kind of linear in one block."""

    block: int
    kind: str
    share: float

    @property
    def text(self) -> str:
        return f"block {self.block}, {self.kind}: {percent(self.share, 2)} pruned"


def sparsity_map(run: FinishedRun) -> Figure:
    """Return the heat map of the achieved sparsity, blocks × linears."""
    linears, places = run.report["linears"], _places(run)
    ratios: dict[tuple[int, str], list[float]] = {}
    for name, place in places.items():
        ratios.setdefault(place, []).append(linears[name]["achieved"])
    cells = [_MapCell(*place, sum(x) / len(x)) for place, x in ratios.items()]
    least, most = (choose(cells, key=lambda c: c.share) for choose in (min, max))
    same = percent(least.share, 2) == percent(most.share, 2)
    where = f"{percent(least.share, 2)} everywhere" if same else f"from {least.text} to {most.text}"
    caption = (
        f"Share of zeros in per cent, counted on the saved weights of {len(linears)} linears in "
        f"{len(run.report['blocks'])} blocks: {where}."
    )
    if len(cells) < len(linears):
        rows: list[Sequence[TableValue]] = [(c.kind, c.block, c.share) for c in cells]
        table = Table(("linear", "block", "achieved"), rows)
    else:
        rows = [
            (name, x["wanted"], x["achieved"], x["rows"]["min"], x["rows"]["max"])
            for name, x in linears.items()
        ]
        table = Table(("linear", "wanted", "achieved", "lowest row", "highest row"), rows)
    spec = _heat_map(cells, least.share, most.share, is_wide(run))
    return Figure("Where the zeros are", caption, spec, table, is_wide(run))


def _heat_map(cells: Sequence[_MapCell], low: float, high: float, wide: bool) -> Spec:
    """Return rectangles, with their numbers where they have room."""
    if high - low < 0.005:  # one colour for one ratio
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    kinds = list(dict.fromkeys(c.kind for c in cells))
    width = max(10, (760 if wide else 330) // len({c.block for c in cells}))
    values = [
        {
            **{"block": c.block, "kind": c.kind, "share": c.share, "text": c.text},
            "shown": f"{100 * c.share:.1f}",
            "ink": "#0b1f3f" if c.share > (low + high) / 2 else "#ffffff",
        }
        for c in cells
    ]
    base: Spec = {
        "x": {
            "field": "block",
            "type": "ordinal",
            "title": "block",
            "axis": {"labelAngle": 0, "ticks": False, "domain": False, "labelOverlap": True},
        },
        "y": {
            "field": "kind",
            "type": "nominal",
            "sort": kinds,
            "title": None,
            "axis": {"ticks": False, "domain": False, "labelColor": INK},
        },
    }
    colour = {
        "field": "share",
        "type": "quantitative",
        "scale": {"scheme": SCHEME, "domain": [low, high]},
        "title": "pruned",
        "legend": {"format": ".0%", "gradientLength": 160, "gradientThickness": 10},
    }
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "stroke": PAPER, "strokeWidth": 1.5},
            "encoding": {**base, "color": colour, "description": {"field": "text"}},
        }
    ]
    if width >= 32:
        shown = {"field": "shown"}, {"field": "ink", "type": "nominal", "scale": None}
        number: Spec = {"type": "text", "fontSize": 11 if width > 40 else 10}
        layers.append({"mark": number, "encoding": {**base, "text": shown[0], "color": shown[1]}})
    return {
        "data": {"values": values},
        "width": {"step": width},
        "height": {"step": 30 if len(kinds) <= 16 else 16},
        "layer": layers,
        "resolve": {"scale": {"color": "independent"}},
        "config": {"scale": {"bandPaddingInner": 0, "bandPaddingOuter": 0}},
    }


def row_ratios(run: FinishedRun) -> Figure:
    """Return how the ratios of rows are distributed, one ridge per kind of linear."""
    title = "Ratios of the rows"
    if not run.ratios:
        return Figure(title, "allocation.safetensors, which holds them, is not beside the report.")
    by_kind: dict[str, list[Tensor]] = {}
    for name, (_, kind) in _places(run).items():
        if name in run.ratios:
            by_kind.setdefault(kind, []).append(run.ratios[name].double().flatten())
    rows = {kind: torch.cat(ratios) for kind, ratios in by_kind.items()}
    lowest = min(float(x.min()) for x in rows.values())
    highest = max(float(x.max()) for x in rows.values())
    ends = f"from {percent(lowest)} to {percent(highest)}"
    caption = (
        f"How the wanted ratios of {sum(map(len, rows.values())):,} rows are spread, over all "
        f"blocks: {ends}. The tallest bar of every linear has the same height."
    )
    if all(x.numel() == 1 for x in run.ratios.values()):
        own = "Every row of a linear has the linear's own ratio"
        if run.weighed:
            own = "The rows of a linear compete for its ratio, weighed by their importance"
        caption = (
            f"{own}: what is spread here are the ratios of {len(run.ratios)} linears over the "
            f"blocks, {ends}."
        )
    headers = ("linear", "rows", "lowest", "5%", "median", "95%", "highest")
    table = [
        (kind, len(x), *np.quantile(x.numpy(), _QUANTILES).tolist()) for kind, x in rows.items()
    ]
    return Figure(title, caption, _ridges(rows, lowest, highest), Table(headers, table))


def _ridges(rows: Mapping[str, Tensor], low: float, high: float) -> Spec:
    """Return a histogram per kind of linear, one above the other, the first on top."""
    kinds = list(rows)
    if high - low < 0.02:  # one ratio is a bar, not a page of it
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    step = (high - low) / _BINS
    ridges = []
    for base, kind in enumerate(reversed(kinds)):
        counts = torch.histc(rows[kind], bins=_BINS, min=low, max=high)
        heights = [*(0.86 * counts / counts.max()).tolist(), 0.0]
        ridges += [
            {"kind": kind, "x": low + i * step, "y": base, "top": base + height}
            for i, height in enumerate(heights)
        ]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "ratio of a row",
        "scale": {"zero": False, "nice": False},
        "axis": {"format": ".0%", "grid": False, "tickCount": 6},
    }
    axis = {
        "values": list(range(len(kinds))),
        "labelExpr": f"{json.dumps(kinds[::-1])}[datum.value]",
        **{"ticks": False, "domain": False, "labelColor": INK, "title": None},
    }
    y = {"type": "quantitative", "scale": {"domain": [0, len(kinds)], "nice": False}, "axis": axis}
    area: Spec = {
        "type": "area",
        "interpolate": "step-after",
        "line": {"strokeWidth": 1, "color": SERIES[0]},
    }
    return {
        **fitted(HALF, 60 + min(36, max(12, 720 // len(kinds))) * len(kinds)),
        "data": {"values": ridges},
        "mark": area | {"fillOpacity": 0.45, "color": SERIES[0]},
        "encoding": {
            "x": x,
            "y": {"field": "y", **y},
            "y2": {"field": "top"},
            "detail": {"field": "kind"},
        },
    }

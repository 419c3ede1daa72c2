"""The figures of a study: quality against sparsity, and against what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuroal.html_report.drawing import INK, MUTED, SERIES, SHAPES
from neuroal.html_report.figure import Figure, Spec, Table, TableValue
from neuroal.study.table import MeanScore
from neuroal.units import duration, percent

_WHOLE = 830  # pixels that panels share
_DENSE = "dense"
# The first, which tends to be the baseline, in grey; neighbours far apart.
_COLOURS = tuple(SERIES[i] for i in (6, 0, 2, 3, 1, 4, 5))
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy by length"}


@dataclass(frozen=True)
class Contest:
    """The scores of every method on one model by one evaluation.

    Attributes:
        model: Label of the model.
        pattern: Of the zeros.
        evaluation: Column of the study.
        metric: perplexity, acc, …
        higher: Whether higher is better.
        cells: Of the methods, in the study's order.
        dense: Of the dense model, if it was evaluated.
    """

    model: str
    pattern: str | None
    evaluation: str
    metric: str
    higher: bool
    cells: Sequence[MeanScore]
    dense: MeanScore | None

    @property
    def name(self) -> str:
        """Return model and evaluation, and the pattern where it is one."""
        pattern = "" if self.pattern in (None, "unstructured") else f" ({self.pattern})"
        return f"{self.model}{pattern}, {self.evaluation}"

    @property
    def measure(self) -> str:
        """Return the metric in words."""
        return _METRICS.get(self.metric, self.metric)

    @property
    def pruners(self) -> list[str]:
        """Return the pruners in the study's order."""
        return list(dict.fromkeys(str(c.pruner) for c in self.cells))

    @property
    def top_ups(self) -> list[str]:
        """Return the top-ups in the study's order."""
        return list(dict.fromkeys(str(c.top_up) for c in self.cells))

    @property
    def sparsities(self) -> list[float]:
        """Return the sparsities in rising order."""
        return sorted({c.sparsity for c in self.cells})

    def shown(self, mean: float, deviation: float | None = None) -> str:
        """Return a score as people read it: accuracies in per cent, perplexities as they are."""
        share = self.higher and 0 <= mean <= 1
        texts = []
        known = deviation is not None and math.isfinite(deviation)
        for value in (mean, deviation if known else None):
            if value is not None and share:
                texts.append(f"{100 * value:.1f}%")
            elif value is not None:
                texts.append(f"{value:,.2f}" if value < 1000 else f"{value:,.0f}")
        return " ± ".join(texts)

    def scale(self) -> Spec:
        """Return the y axis: logarithmic where scores span more than a factor of three."""
        values = [c.mean for c in self.cells if math.isfinite(c.mean)]
        title = f"{self.measure} ({'higher' if self.higher else 'lower'} is better)"
        wide = bool(values) and min(values) > 0 and max(values) > 3 * min(values)
        kind = {"type": "log", "nice": False} if wide and not self.higher else {"zero": False}
        share = self.higher and all(0 <= v <= 1 for v in values)
        return {
            "type": "quantitative",
            "title": title,
            "scale": {**kind, "padding": 10},
            "axis": {"format": ".0%" if share else "~s", "tickCount": 5},
        }


def _panels(contest: Contest, field: str, order: Sequence[Any]) -> Spec:
    """Return the facets of a view and the size of one."""
    count = len(order)
    columns = min(count, 4)
    return {
        "facet": {"field": field, "type": "nominal", "title": None, "sort": list(order)},
        "columns": columns,
        "spacing": 24,
        "width": max(170, min(460, _WHOLE // columns - 36)),
    }


def against_sparsity(contest: Contest) -> Figure:
    """Return the scores of every top-up against the sparsity, a panel per pruner."""
    finite = [c for c in contest.cells if math.isfinite(c.mean)]
    values: list[dict[str, Any]] = []
    spread: list[dict[str, Any]] = []
    for c in finite:
        text = f"{c.pruner} + {c.top_up}, {percent(c.sparsity, 0)}: "
        text += contest.shown(c.mean, c.deviation)
        place = {"pruner": c.pruner, "method": c.top_up, "x": c.sparsity}
        values.append(place | {"y": c.mean, "text": text})
        if c.deviation and math.isfinite(c.deviation):
            low, high = c.mean - c.deviation, c.mean + c.deviation
            spread.append(place | {"low": max(low, 1e-9), "high": high})
    if contest.dense is not None and math.isfinite(contest.dense.mean):
        text = f"dense: {contest.shown(contest.dense.mean)}"
        values += [
            {"pruner": p, "method": _DENSE, "x": x, "y": contest.dense.mean, "text": text}
            for p in contest.pruners
            for x in contest.sparsities
        ]
    facet = _panels(contest, "pruner", contest.pruners)
    inner = {"width": facet.pop("width"), "height": 260, "layer": _sparsity_layers(contest)}
    spec = {"data": {"values": values + spread}, **facet, "spec": inner}
    most = contest.sparsities[-1]
    caption = f"Best at {percent(most, 0)}: " + "; ".join(
        f"{c.pruner} + {c.top_up}, {contest.shown(c.mean, c.deviation)}"
        for c in contest.cells
        if c.best and c.sparsity == most
    )
    if contest.dense is not None:
        caption += f". Dense: {contest.shown(contest.dense.mean)}"
    lost = len(contest.cells) - len(finite)
    if lost:
        caption += f". Not drawn, since not finite: {lost} of {len(contest.cells)} scores"
    title = f"{contest.measure.capitalize()} against sparsity: {contest.name}"
    return Figure(title, f"{caption}.", spec, _numbers(contest, ()), wide=True)


def _sparsity_layers(contest: Contest) -> list[Spec]:
    """Return a line per method, bars of its deviations, and its points."""
    looks = _looks([*contest.top_ups, _DENSE])
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "sparsity",
        "scale": {"zero": False, "nice": False, "padding": 16},
        "axis": {"values": contest.sparsities, "format": ".0%", "grid": False},
    }
    scale = contest.scale()
    y = {"field": "y", **scale}
    return [
        {
            "mark": {"type": "line"},
            "encoding": {"x": x, "y": y, **looks("color"), **looks("strokeDash")},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {"x": x, **looks("color")}
            | {"y": {"field": "low", **scale}, "y2": {"field": "high"}},
        },
        {
            "transform": [{"filter": "datum.method != 'dense' && isValid(datum.y)"}],
            "mark": {"type": "point", "filled": True, "opacity": 1, "size": 48},
            "encoding": {"x": x, "y": y, **looks("color"), **looks("shape")}
            | {"description": {"field": "text"}},
        },
    ]


def _looks(methods: Sequence[str]) -> Any:
    """Return encodings of the methods: the dense model in ink and dashes, the others in colour."""

    def look(channel: str) -> Spec:
        count = range(len(methods) - 1)
        ranges = {
            "color": [*(_COLOURS[i % len(_COLOURS)] for i in count), INK],
            "shape": [*(SHAPES[i % len(SHAPES)] for i in count), "stroke"],
            "strokeDash": [*([1, 0] if i < len(_COLOURS) else [6, 2] for i in count), [3, 3]],
        }
        scale = {"domain": list(methods), "range": ranges[channel]}
        return {channel: {"field": "method", "type": "nominal", "title": None, "scale": scale}}

    return look


def front(cells: Sequence[MeanScore], higher: bool) -> list[MeanScore]:
    """Return the cells that none beats in both time and score, from the fastest to the best."""
    sign = -1 if higher else 1
    unbeaten: list[MeanScore] = []
    known = [c for c in cells if c.seconds is not None and math.isfinite(c.mean)]
    for c in sorted(known, key=lambda c: (c.seconds, sign * c.mean)):
        if not unbeaten or sign * c.mean < sign * unbeaten[-1].mean:
            unbeaten.append(c)
    return unbeaten


def against_time(contest: Contest) -> Figure | None:
    """Return the scores against the seconds of the pruning, with the Pareto front, by sparsity."""
    known = [c for c in contest.cells if c.seconds and math.isfinite(c.mean)]
    if not known:
        return None
    fronts = {
        s: front([c for c in known if c.sparsity == s], contest.higher) for s in contest.sparsities
    }
    on_front = {id(c) for cells in fronts.values() for c in cells}
    values: list[dict[str, Any]] = [
        {
            "panel": percent(c.sparsity, 0),
            **{"x": c.seconds, "y": c.mean, "pruner": c.pruner, "method": c.top_up},
            "front": "on the front" if id(c) in on_front else "off",
            "text": f"{c.pruner} + {c.top_up}: {contest.shown(c.mean, c.deviation)} in "
            f"{duration(c.seconds or 0)}{', on the front' if id(c) in on_front else ''}",
        }
        for c in known
    ]
    facet = _panels(contest, "panel", [percent(s, 0) for s in contest.sparsities])
    inner = {"width": facet.pop("width"), "height": 240, "layer": _time_layers(contest)}
    own_scale = {"resolve": {"scale": {"y": "independent"}}}
    spec = {"data": {"values": values}, **facet, "spec": inner, **own_scale}
    most = contest.sparsities[-1]
    steps = "; ".join(
        f"{c.pruner} + {c.top_up} ({contest.shown(c.mean)} in {duration(c.seconds or 0)})"
        for c in fronts[most]
    )
    caption = (
        "The dotted line is the Pareto front: no method is both faster and better. At "
        f"{percent(most, 0)}: {steps}."
    )
    title = f"{contest.measure.capitalize()} against time: {contest.name}"
    return Figure(title, caption, spec, _numbers(contest, on_front), wide=True)


def _time_layers(contest: Contest) -> list[Spec]:
    """Return the Pareto front as steps, and a point per method."""
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "seconds of pruning",
        "scale": {"type": "log", "nice": False, "padding": 16},
        "axis": {"format": "~g", "tickCount": 4, "grid": False},
    }
    y = {"field": "y", **contest.scale()}

    def look(field: str, domain: Sequence[str], looks: Sequence[Any]) -> Spec:
        chosen = [looks[i % len(looks)] for i in range(len(domain))]
        legend = {"symbolFillColor": MUTED, "symbolStrokeColor": MUTED} if field == "pruner" else {}
        scale = {"type": "ordinal", "domain": domain, "range": chosen}
        return {"field": field, "type": "nominal", "title": None, "scale": scale, "legend": legend}

    colour = look("method", contest.top_ups, _COLOURS)
    shape = look("pruner", contest.pruners, SHAPES)
    size = look("front", ["on the front", "off"], [110, 42]) | {"legend": None}
    step: Spec = {
        "transform": [{"filter": "datum.front == 'on the front'"}],
        "mark": {"type": "line", "interpolate": "step-after", "color": INK, "strokeDash": [2, 3]}
        | {"strokeWidth": 1.25},
        "encoding": {"x": x, "y": y},
    }
    points: Spec = {
        "mark": {"type": "point", "filled": True, "opacity": 1},
        "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "size": size}
        | {"description": {"field": "text"}},
    }
    return [step, points]


def _numbers(contest: Contest, on_front: Any) -> Table:
    """Return every score of a contest in full."""
    rows: list[Sequence[TableValue]] = []
    best = set()
    for c in contest.cells:
        if c.best:
            best.add((len(rows), 3))
        row = [c.pruner, c.top_up, c.sparsity, c.mean, c.deviation, c.seeds, c.seconds]
        rows.append([*row, "yes" if id(c) in on_front else "no"] if on_front else row)
    headers = ["pruner", "top-up", "sparsity", contest.measure, "deviation", "seeds", "seconds"]
    return Table((*headers, "on the front") if on_front else tuple(headers), rows, frozenset(best))

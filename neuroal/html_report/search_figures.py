"""The figures of the search: what each candidate cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neuroal.html_report.drawing import MUTED, PAPER, SERIES
from neuroal.html_report.figure import HALF, Figure, Spec, Table, finite, fitted
from neuroal.html_report.reading import FinishedRun
from neuroal.units import number, parameters

STEPS = {"block_ratios": "block ratios", "row_ratios": "row ratios"}


_LOOKS: Mapping[str, tuple[str, int, str, str]] = {  # shape, area, fill, line
    "measured": ("circle", 36, SERIES[0], SERIES[0]),
    "chosen": ("diamond", 170, SERIES[1], SERIES[1]),
    "dropped early": ("triangle-up", 60, PAPER, MUTED),
    "probe": ("circle", 24, PAPER, MUTED),
}


def misalignment(run: FinishedRun, role: str) -> Figure:
    """Return the misalignment of a step's candidates, against λ where they have one."""
    title = f"Search for {STEPS[role]}"
    candidates = [c for c in run.report["candidates"] if c["role"] == role]
    measured = [c for c in candidates if finite(c["misalignment"]) is not None]
    if not measured:
        chosen = candidates[0]["plugin"] if candidates else None
        why = f"'{chosen}' proposes one allocation" if chosen else "the ratios were given"
        return Figure(title, f"Nothing to compare in this step: {why}.")
    by_lam = len(measured) > 1 and all("lam" in c["parameters"] for c in measured)
    points = [_point(c, order, by_lam) for order, c in enumerate(measured, start=1)]
    spec = fitted(HALF, 260) | {"data": {"values": points}, "layer": _layers(points, by_lam)}
    rows = [
        (c["plugin"], parameters(c["parameters"]), finite(c["misalignment"]), _outcome(c))
        for c in candidates
    ]
    dropped = sum(c["dropped"] for c in measured)
    caption = f"{len(points)} candidates" if len(points) > 1 else "One candidate"
    caption += f", {dropped} of them dropped early" if dropped else ""
    caption += "".join(f". Chosen: {p['words']}" for p in points if p["outcome"] == "chosen")
    left = " A dropped candidate leaves at a sum that is already above the best total."
    headers = ("strategy", "parameters", "misalignment", "outcome")
    return Figure(title, f"{caption}.{left if dropped else ''}", spec, Table(headers, rows))


def _outcome(candidate: Mapping[str, Any]) -> str:
    if candidate["selected"]:
        return "chosen"
    if candidate["dropped"]:
        return "dropped early"
    return "probe" if candidate.get("probe") else "measured"


def _point(candidate: Mapping[str, Any], order: int, by_lam: bool) -> dict[str, Any]:
    outcome, value = _outcome(candidate), float(candidate["misalignment"])
    what = ", ".join(filter(None, [candidate["plugin"], parameters(candidate["parameters"])]))
    words = f"{what}: {'at least ' if candidate['dropped'] else ''}{number(value)}"
    return {
        "x": candidate["parameters"]["lam"] if by_lam else order,
        "y": value,
        "outcome": outcome,
        "plugin": candidate["plugin"],
        "line": f"{candidate['plugin']}, {candidate.get('windows')} windows",
        "words": words,
        "text": f"{words} ({outcome})",
    }


def _layers(points: Sequence[Mapping[str, Any]], by_lam: bool) -> list[Spec]:
    """Return a line per strategy, a mark per candidate, and a rule at the chosen one."""
    several = len({p["plugin"] for p in points}) > 1
    outcomes = [o for o in _LOOKS if any(p["outcome"] == o for p in points)]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "λ" if by_lam else "candidate, in the order of the search",
        "scale": {"zero": False, "nice": False, "padding": 12},
        "axis": {"grid": False, "tickCount": 6} | ({} if by_lam else {"tickMinStep": 1}),
    }
    y = {
        "field": "y",
        "type": "quantitative",
        "title": "misalignment",
        "scale": {"zero": False, "padding": 8},
        "axis": {"format": "~g", "tickCount": 5},
    }
    strategy = {"field": "plugin", "title": None, "scale": {"range": SERIES}}

    def by_outcome(part: int) -> Spec:
        scale = {
            "type": "ordinal",
            "domain": outcomes,
            "range": [_LOOKS[o][part] for o in outcomes],
        }
        return {"field": "outcome", "title": None, "scale": scale}

    colours = {"color": strategy} if several else {"fill": by_outcome(2), "stroke": by_outcome(3)}
    marks = {"x": x, "y": y, "shape": by_outcome(0), "size": by_outcome(1)}
    described = {"description": {"field": "text"}}
    lines = {"x": x, "y": y, "detail": {"field": "line"}} | ({"color": strategy} if several else {})
    return [
        {
            "transform": [{"filter": "datum.outcome == 'chosen'"}],
            "mark": {"type": "rule", "strokeDash": [3, 3], "color": SERIES[1]},
            "encoding": {"x": x},
        },
        {
            "transform": [{"filter": "datum.outcome == 'measured' || datum.outcome == 'chosen'"}],
            "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.55, "color": SERIES[0]},
            "encoding": lines,
        },
        {
            "mark": {"type": "point", "filled": True, "opacity": 1, "strokeWidth": 1.5},
            "encoding": marks | colours | described,
        },
    ]

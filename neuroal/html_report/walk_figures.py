"""The figures of the final walk and of what the run took: activations, time, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neuroal.html_report.drawing import INK, SERIES
from neuroal.html_report.figure import HALF, Figure, Spec, Table, fitted
from neuroal.html_report.reading import FinishedRun, is_wide, local
from neuroal.units import duration, number, percent, size


def input_norms(run: FinishedRun) -> Figure:
    """Return the mean input norm of every block, dense against pruned, and their ratio."""
    title = "Activations, dense against pruned"
    blocks: list[list[Mapping[str, float | None]]] = [[] for _ in run.report["blocks"]]
    for name, x in run.report["linears"].items():
        if "input_norm" in x:
            blocks[local(name, run.report)[0]].append(x["input_norm"])
    if not any(blocks):
        return Figure(
            title,
            "Not measured: the final pruning ran no block, since neither pruner nor refiner reads "
            "statistics, or the report was written before norms were recorded.",
        )
    table, lines = [], []
    for block, norms in enumerate(blocks):
        means = {key: _mean([n[key] for n in norms]) for key in ("dense", "pruned")}
        dense, pruned = means["dense"], means["pruned"]
        table.append((block, dense, pruned, pruned / dense if dense and pruned else None))
        for key, value in means.items():
            if value is not None:
                text = f"block {block}, {key}: {number(value, 4)}"
                lines.append({"block": block, "weights": key, "norm": value, "text": text})
    spec = {
        **fitted(HALF, 260),
        "data": {"values": lines},
        "mark": {"type": "line", "point": {"size": 44, "filled": True}},
        "encoding": {
            "x": {
                "field": "block",
                "type": "quantitative",
                "title": "block",
                "scale": {"nice": False, "padding": 12},
                "axis": {"grid": False, "format": "d", "tickMinStep": 1},
            },
            "y": {
                "field": "norm",
                "type": "quantitative",
                "title": "mean input norm",
                "axis": {"format": "~g", "tickCount": 5},
            },
            "color": _by_weights([INK, SERIES[1]]),
            "strokeDash": _by_weights([[1, 0], [5, 3]]),
            "shape": _by_weights(["circle", "diamond"]),
            "description": {"field": "text"},
        },
    }
    shares = [row[3] for row in table if row[3] is not None]
    ends = f"from {percent(min(shares))} to {percent(max(shares))}" if shares else "not known"
    caption = (
        "Mean norm of what the linears of a block read, on the calibration windows: with the "
        "block's dense weights, and with its pruned ones, both behind the pruned blocks before it. "
        f"Pruned over dense: {ends}. The last block does not run pruned."
    )
    headers = ("block", "dense", "pruned", "pruned / dense")
    return Figure(title, caption, spec, Table(headers, table))


def _by_weights(look: list[Any]) -> Spec:
    scale = {"domain": ["dense", "pruned"], "range": look}
    return {"field": "weights", "type": "nominal", "title": None, "scale": scale}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def phases(run: FinishedRun) -> Figure:
    """Return seconds and peak memory of every phase."""
    timings: Mapping[str, float] = run.report["timings"]
    peaks: Mapping[str, int] = run.report.get("phase_memory_bytes") or {}
    rows = list(_phase_rows(timings, peaks))
    order = [r["phase"] for r in rows]
    wide = is_wide(run)  # without it a gap would be left next to the map
    width = 340 if wide else 150
    panels = [_bars(rows, order, "seconds", "time", SERIES[0], width)]
    if peaks:
        memory_bars = _bars(rows, order, "bytes", "peak memory so far", SERIES[2], width)
        memory_bars["encoding"]["y"]["axis"] = None
        panels.append(memory_bars)
    spec = {"data": {"values": rows}, "hconcat": panels, "spacing": 16}
    total, peak = sum(timings.values()), run.report["peak_memory_bytes"]
    longest = max(timings, key=lambda k: timings[k]).replace("_", " ")
    caption = (
        f"{duration(total)} in all, most of it in the phase '{longest}'; {size(peak)} at the "
        "peak. The phase in which memory last rises has the peak."
    )
    table = [(p, timings[p], peaks.get(p)) for p in timings]
    numbers = Table(("phase", "seconds", "bytes"), table)
    return Figure("Time and memory", caption, spec, numbers, wide)


def _phase_rows(timings: Mapping[str, float], peaks: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for phase, value in timings.items():
        row = {"phase": phase.replace("_", " "), "seconds": value, "seconds_shown": duration(value)}
        if phase in peaks:
            row |= {"bytes": peaks[phase], "bytes_shown": size(peaks[phase])}
        texts = (row.get("seconds_shown"), row.get("bytes_shown"))
        yield row | {"text": f"{row['phase']}: {', '.join(str(t) for t in texts if t)}"}


def _bars(
    rows: Sequence[Mapping[str, Any]],
    order: Sequence[str],
    field: str,
    title: str,
    colour: str,
    width: int,
) -> Spec:
    """Return bars with their values at the end, which need no axis."""
    axis = {"ticks": False, "domain": False, "labelColor": INK}
    highest = max(r.get(field, 0) for r in rows) or 1
    scale = {"domain": [0, 1.5 * highest], "nice": False}  # room for the values
    x = {"field": field, "type": "quantitative", "axis": None, "scale": scale}
    y = {"field": "phase", "type": "nominal", "sort": list(order), "title": None, "axis": axis}
    place = {"align": "left", "dx": 5}
    return {
        "width": width,
        "height": {"step": 30},
        "title": {"text": title, "anchor": "start", "fontSize": 12, "fontWeight": "normal"}
        | {"color": INK, "offset": 6, "aria": False},
        "encoding": {"y": y, "x": x, "description": {"field": "text"}},
        "layer": [
            {"mark": {"type": "bar", "height": 16, "color": colour, "cornerRadiusEnd": 2}},
            {
                "mark": {"type": "text", **place},
                "encoding": {"text": {"field": f"{field}_shown"}},
            },
        ],
    }

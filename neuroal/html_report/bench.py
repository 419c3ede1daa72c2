"""What `neuroal bench` measured of a run: a figure and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neuroal.html_report.drawing import INK, MUTED, SERIES
from neuroal.html_report.figure import Figure, Spec, Table, finite
from neuroal.html_report.reading import FinishedRun
from neuroal.html_report.section import Details
from neuroal.units import number, size

_COLUMNS = {
    "prefill, tokens/s": "prefill_tokens_per_second",
    "over dense": "prefill_over_dense",
    "decode, tokens/s": "decode_tokens_per_second",
    "over dense ": "decode_over_dense",
    "largest difference of logits": "difference",
}

_STEPS = {"prefill": "prefill, × dense", "decode": "decode, × dense"}


def bench_tables(report: Mapping[str, Any]) -> Iterator[Details]:
    """Yield a table for each time that the run was measured."""
    for found in report.get("bench", ()):
        where = found["environment"]
        rows = [
            (
                str(x["form"]),
                x["batch"],
                size(x["memory_bytes"]),
                *(finite(x[key]) for key in _COLUMNS.values()),
                x["gain"],
            )
            for x in found["measured"]
        ]
        words = [
            f"A prompt of {found['prompt']} tokens, then {found['tokens']} one by one, in "
            f"{where.get('dtype')} on {where.get('device')} ({where.get('threads')} threads, "
            f"{where.get('platform')}).",
            *(f"{form}: {why}." for form, why in found["not_measured"].items()),
            *(f"Note: {note}." for note in found.get("notes", ())),
        ]
        headers = ("form", "batch", "memory", *_COLUMNS, "gain")
        yield Details("Gains on a machine", " ".join(words), table=Table(headers, rows))


def gains(run: FinishedRun) -> Iterator[Figure]:
    """Yield, for each time that a run was measured, the speed of its forms against the dense model.

    Bars shorter than the line at 1 are slower.
    """
    for found in run.report.get("bench", ()):
        rows = list(_speeds(found))
        panels = [_panel(rows, step, colour) for step, colour in zip(_STEPS, SERIES, strict=False)]
        where = found["environment"]
        gained = [f"{x['form']}: {x['gain']}" for x in found["measured"] if x["gain"]]
        caption = (
            f"Tokens per second over the dense model's, medians of {found['repeats']} rounds on "
            f"{where.get('device')} in {where.get('dtype')}; the line at 1 is the dense model, and "
            f"what does not reach it is slower. {'; '.join(dict.fromkeys(gained))}."
        )
        numbers = Table(
            ("form", *_STEPS.values()), [(x["form"], *(x.get(s) for s in _STEPS)) for x in rows]
        )
        spec = {"data": {"values": rows}, "hconcat": panels, "spacing": 16}
        yield Figure("Speed against the dense model", caption, spec, numbers)


def _speeds(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each form and batch its speed in prefill and decode over the dense model's."""
    several = len({x["batch"] for x in found["measured"]}) > 1
    for x in found["measured"]:
        if x["gain"] is None:  # the one that the others are measured against
            continue
        form = f"{x['form']}, batch of {x['batch']}" if several else str(x["form"])
        row: dict[str, Any] = {"form": form}
        for step in _STEPS:
            value = finite(x[f"{step}_over_dense"])
            if value is not None:
                row |= {step: value, f"{step}_shown": number(value, 3)}
        shown = ", ".join(f"{step} {row[f'{step}_shown']}" for step in _STEPS if step in row)
        yield row | {"text": f"{form}: {shown}"}


def _panel(rows: Sequence[Mapping[str, Any]], step: str, colour: str) -> Spec:
    """Return the bars of prefill or decode, with a line at the dense model."""
    highest = max([1.0, *(x.get(step, 0.0) for x in rows)])
    first = step == next(iter(_STEPS))  # names stand at the first panel alone
    axis = {"ticks": False, "domain": False, "labelColor": INK} if first else None
    x = {
        "field": step,
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [0, 1.5 * highest], "nice": False},  # room for the values
    }
    y = {"field": "form", "type": "nominal", "sort": None, "title": None, "axis": axis}
    bars = {"y": y, "x": x, "description": {"field": "text"}}
    return {
        "width": 130,
        "height": {"step": 30},
        "title": {"text": _STEPS[step], "anchor": "start", "fontSize": 12, "fontWeight": "normal"}
        | {"color": INK, "offset": 6, "aria": False},
        "layer": [
            {
                "mark": {"type": "bar", "height": 16, "color": colour, "cornerRadiusEnd": 2},
                "encoding": bars,
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 8},
                "encoding": {"y": y, "x": {"datum": highest}, "text": {"field": f"{step}_shown"}},
            },
            {
                "mark": {"type": "rule", "strokeDash": [3, 3], "color": MUTED},
                "encoding": {"x": {"datum": 1}},
            },
        ],
    }

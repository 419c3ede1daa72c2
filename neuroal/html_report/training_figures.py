"""The figure of a fine-tuning: its loss by step."""

from __future__ import annotations

from collections.abc import Iterator

from neuroal.html_report.drawing import SERIES
from neuroal.html_report.figure import HALF, Figure, Table, finite, fitted
from neuroal.html_report.reading import FinishedRun
from neuroal.units import number


def losses(run: FinishedRun) -> Iterator[Figure]:
    """Yield the loss of a fine-tuned run by step; none for a run that was not trained."""
    training = run.report.get("training")
    if not training:
        return
    points = [
        (int(step), loss) for step, x in training["losses"] if (loss := finite(x)) is not None
    ]
    if not points:
        yield Figure("Training loss", "No loss was a finite number.")
        return
    first, last = points[0], points[-1]
    of = "KL(dense ‖ pruned)" if training["settings"]["distil"] else "cross-entropy of next tokens"
    values = [{"step": s, "loss": x, "text": f"step {s}: {number(x, 4)}"} for s, x in points]
    spec = {
        **fitted(HALF, 260),
        "data": {"values": values},
        "mark": {"type": "line", "color": SERIES[0], "point": {"size": 24, "filled": True}},
        "encoding": {
            "x": {
                "field": "step",
                "type": "quantitative",
                "title": "step",
                "scale": {"nice": False, "padding": 12},
                "axis": {"grid": False, "format": "d", "tickMinStep": 1},
            },
            "y": {
                "field": "loss",
                "type": "quantitative",
                "title": "loss",
                "scale": {"zero": False},
                "axis": {"format": "~g", "tickCount": 5},
            },
            "description": {"field": "text"},
        },
    }
    caption = (
        f"Mean {of} on the windows of each stretch of steps: from "
        f"{number(first[1], 4)} at step {first[0]} to {number(last[1], 4)} at step {last[0]}."
    )
    yield Figure("Training loss", caption, spec, Table(("step", "loss"), points))

"""What `neuroal bench` measured of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neuroal.html_report.figure import Table, finite
from neuroal.html_report.section import Details
from neuroal.units import size

_COLUMNS = {
    "prefill, tokens/s": "prefill_tokens_per_second",
    "over dense": "prefill_over_dense",
    "decode, tokens/s": "decode_tokens_per_second",
    "over dense ": "decode_over_dense",
    "largest difference of logits": "difference",
}


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

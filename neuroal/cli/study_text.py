"""What `neuroal study` says: plans, outcomes, and tables of results."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neuroal.cli.tables import table
from neuroal.escape import markdown
from neuroal.units import rough_duration

if TYPE_CHECKING:
    from neuroal.study.estimate import StudyTime
    from neuroal.study.results import StudyResults
    from neuroal.study.run import PreparedStudy
    from neuroal.study.table import MeanScore

_AXES = ("models", "pruners", "top_ups", "patterns", "sparsities", "seeds", "evaluations")
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "\\": "\\textbackslash{}",
        "<": "\\textless{}",
        ">": "\\textgreater{}",
        "\n": " ",
    }
)


def plan_json(
    prepared: PreparedStudy, guess: StudyTime | None, notes: Sequence[str]
) -> dict[str, Any]:
    """Return the plan with every case as JSON values."""
    left = {case.id for case, _ in prepared.jobs}
    return {
        "out": str(prepared.out),
        "cases": [
            {"id": c.id, "case": dict(c.labels), "finished": c.id not in left}
            for c in prepared.expansion.cases
        ],
        "skipped": [dataclasses.asdict(s) for s in prepared.expansion.skipped],
        "finished": prepared.finished,
        "left": len(prepared.jobs),
        "estimate": None if guess is None else dataclasses.asdict(guess),
        "notes": list(notes),
    }


def plan_text(
    prepared: PreparedStudy, guess: StudyTime | None, jobs: int, notes: Sequence[str]
) -> str:
    """Return the plan as tables."""
    study, expansion = prepared.study, prepared.expansion
    axes = [(name.replace("_", "-"), _labels(getattr(study, name))) for name in _AXES]
    dense = sum(case.recipe is None for case in expansion.distinct)
    same = len(expansion.cases) - len(expansion.distinct)
    counts = [f"{dense} dense"] + ([f"{same} more are the same by another name"] if same else [])
    rows = [
        ("cases", f"{len(expansion.distinct)} ({', '.join(counts)})"),
        ("skipped", len(expansion.skipped)),
        ("finished", prepared.finished),
        ("left", len(prepared.jobs)),
        *([("time", _time_text(guess, jobs))] if guess is not None else []),
        ("results", prepared.out),
    ]
    reasons = Counter(s.reason for s in expansion.skipped)
    parts = [
        table(axes),
        table(rows),
        table([(n, reason) for reason, n in reasons.items()], ("skipped", "because"), right=[0]),
        *_estimate_notes(guess),
        "\n".join(f"Note: {note}" for note in notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _labels(entries: Iterable[Any]) -> str:
    texts = [getattr(entry, "label", None) or str(entry) for entry in entries]
    return ", ".join(texts) or "the pattern's own"


def _time_text(guess: StudyTime, jobs: int) -> str:
    text = f"about {rough_duration(guess.seconds / jobs)}"
    return text if jobs == 1 else f"{text} with {jobs} at once, if they have cores of their own"


def _estimate_notes(guess: StudyTime | None) -> Iterator[str]:
    if guess is None:
        return
    if guess.timed:
        yield (
            f"Note: {guess.timed} cases are judged by block runs and the pace of the dense model, "
            "without the time for masks, updates and further generations of a search."
        )
    if guess.extrapolated:
        yield "Note: the pace is extrapolated from a part of one block."
    if guess.unknown:
        yield (
            f"Note: not in the time, until a case of the model is finished: "
            f"{', '.join(guess.unknown)}."
        )


def outcome_json(
    prepared: PreparedStudy, failed: Sequence[Mapping[str, str]], seconds: float
) -> dict[str, Any]:
    """Return what became of a study as JSON values."""
    return {
        "out": str(prepared.out),
        "cases": len(prepared.expansion.distinct),
        "earlier": prepared.finished,
        "run": len(prepared.jobs),
        "failed": [dict(f) for f in failed],
        "skipped": len(prepared.expansion.skipped),
        "seconds": round(seconds, 3),
    }


def outcome_text(
    prepared: PreparedStudy, failed: Sequence[Mapping[str, str]], seconds: float
) -> str:
    """Return what became of a study as a table."""
    rows = [
        ("cases", len(prepared.expansion.distinct)),
        ("finished earlier", prepared.finished),
        ("finished now", len(prepared.jobs) - len(failed)),
        ("failed", len(failed)),
        ("skipped", len(prepared.expansion.skipped)),
        ("time", rough_duration(seconds)),
        ("results", prepared.out),
    ]
    failures = table([(f["title"], f["error"]) for f in failed], ("failed", "error"))
    hint = f"neuroal study table {prepared.out}"
    return "\n\n".join(part for part in (table(rows), failures, hint) if part)


def unfinished(results: StudyResults) -> Iterator[str]:
    """Yield a line on what the tables lack."""
    status = Counter(case["status"] for case in results.cases)
    if status["failed"]:
        yield f"Note: {status['failed']} cases failed"
    if status["missing"]:
        yield f"Note: {status['missing']} cases have not run yet"


def csv_text(cells: Sequence[MeanScore]) -> str:
    """Return a line a cell, with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, [f.name for f in dataclasses.fields(cells[0])], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(dataclasses.asdict(cell) for cell in cells)
    return out.getvalue()


def tables_text(cells: Sequence[MeanScore], style: str) -> str:
    """Return a table an evaluation: methods down, sparsities across.

    Args:
        cells: All of it.
        style: "github" or "latex".
    """
    names = dict.fromkeys((cell.evaluation, cell.metric) for cell in cells)
    return "\n\n".join(
        _table_of([c for c in cells if (c.evaluation, c.metric) == name], style) for name in names
    )


def _table_of(cells: Sequence[MeanScore], style: str) -> str:
    patterns = len({cell.pattern for cell in cells if cell.pattern is not None}) > 1
    sparsities = sorted({cell.sparsity for cell in cells})
    rows: dict[tuple[str, ...], dict[float, str]] = {}
    for cell in cells:
        names = (cell.model, cell.pruner or "dense", cell.top_up or "")
        key = (*names, cell.pattern or "") if patterns else names
        rows.setdefault(key, {})[cell.sparsity] = _cell_text(cell, style)
    escape = (lambda text: text.translate(_LATEX)) if style == "latex" else markdown
    percent = "\\%" if style == "latex" else "%"
    headers = ["model", "pruner", "top-up", *(["pattern"] if patterns else [])]
    width = len(headers)
    headers += [f"{100 * s:g} {percent}" for s in sparsities]
    grid = [[*map(escape, key), *(row.get(s, "") for s in sparsities)] for key, row in rows.items()]
    kind = "latex_raw" if style == "latex" else "github"
    text = table(grid, headers, right=range(width, len(headers)), style=kind)
    first = cells[0]
    title = " ".join(f"{first.evaluation} ({_metric_text(first.metric)})".split())
    return f"% {title}\n{text}" if style == "latex" else f"**{markdown(title)}**\n\n{text}"


def _metric_text(metric: str) -> str:
    return f"{metric}, %" if metric.startswith("acc") else metric


def _cell_text(cell: MeanScore, style: str) -> str:
    text = number(cell.mean, cell.metric)
    if cell.deviation is not None:
        sign = "$\\pm$" if style == "latex" else "±"
        text = f"{text} {sign} {number(cell.deviation, cell.metric)}"
    if cell.best:
        text = f"\\textbf{{{text}}}" if style == "latex" else f"**{text}**"
    return f"{text} ({cell.seeds} of {cell.seeds + cell.missing})" if cell.missing else text


def number(value: float, metric: str) -> str:
    """Return a score as tables have it: an accuracy in per cent, two digits, large ones rounded."""
    if metric.startswith("acc"):
        value = 100 * value
    if not math.isfinite(value):
        return str(value)
    return (
        f"{value:.2f}"
        if abs(value) < 1000
        else f"{value:.0f}"
        if abs(value) < 1e6
        else f"{value:.1e}"
    )

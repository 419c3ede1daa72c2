"""What a report says of a study."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from neuroal.html_report.section import Details, Fact, MethodRow, ScoreTable, Section, ShownScore
from neuroal.html_report.study_figures import Contest, against_sparsity, against_time
from neuroal.study.results import DONE, FAILED, MISSING, StudyResults
from neuroal.study.table import MeanScore, cells
from neuroal.units import duration, percent

_NAMED = 8  # failed cases that a note names; the others are counted


def study_section(results: StudyResults) -> Section:
    """Return the section of a study, finished or not."""
    contests = list(_contests(results))
    figures = []
    for contest in contests:
        figures += [f for f in (against_sparsity(contest), against_time(contest)) if f is not None]
    return Section(
        title=f"Study: {results.study['name']}",
        lead=_lead(results),
        facts=list(_facts(results)),
        notes=list(_notes(results)),
        figures=figures,
        listings=[_asked(results)],
        comparisons=[_comparison(c) for c in contests],
    )


def _contests(results: StudyResults) -> Iterator[Contest]:
    scores = cells(results)
    higher = {
        column: bool(score["higher_is_better"])
        for case in results.cases
        for column, score in case["scores"].items()
    }
    methods = [c for c in scores if c.pruner is not None]
    for model, pattern, column in dict.fromkeys(
        (c.model, c.pattern, c.evaluation) for c in methods
    ):
        own = [c for c in methods if (c.model, c.pattern, c.evaluation) == (model, pattern, column)]
        dense = [
            c for c in scores if c.pruner is None and (c.model, c.evaluation) == (model, column)
        ]
        yield Contest(
            model=model,
            pattern=pattern,
            evaluation=column,
            metric=own[0].metric,
            higher=higher[column],
            cells=own,
            dense=dense[0] if dense else None,
        )


def _comparison(contest: Contest) -> ScoreTable:
    """Return methods against sparsities, the dense model first."""
    own: dict[tuple[str, str], dict[float, MeanScore]] = {}
    for c in contest.cells:
        own.setdefault((str(c.pruner), str(c.top_up)), {})[c.sparsity] = c
    rows = [
        MethodRow(pruner, top_up, [_score(contest, by_sparsity.get(s)) for s in contest.sparsities])
        for (pruner, top_up), by_sparsity in own.items()
    ]
    if contest.dense is not None:
        dense = ShownScore(contest.dense.mean, contest.shown(contest.dense.mean), best=False)
        rows.insert(0, MethodRow("dense", "", [dense] * len(contest.sparsities), dense=True))
    seeds = max(c.seeds for c in contest.cells)
    spread = f"mean ± deviation over {seeds} seeds" if seeds > 1 else "one seed"
    better = "higher" if contest.higher else "lower"
    several = len(contest.top_ups) > 1
    best = "the best top-up on a pruner" if several else "the best pruner"
    words = f"{contest.measure.capitalize()}, {better} is better; {spread}. "
    words += f"★ marks {best} at that sparsity."
    columns = [percent(s, 0) for s in contest.sparsities]
    return ScoreTable(contest.name, words, columns, rows)


def _score(contest: Contest, cell: MeanScore | None) -> ShownScore | None:
    if cell is None:
        return None
    return ShownScore(cell.mean, contest.shown(cell.mean, cell.deviation), cell.best)


def _lead(results: StudyResults) -> str:
    asked = [case["case"] for case in results.cases if case["case"]["pruner"] is not None]
    parts = []
    for key in ("model", "pruner", "top_up", "sparsity", "pattern", "seed"):
        count = len({case[key] for case in asked})
        if count > 1 or key in ("model", "pruner", "top_up"):
            word = key.replace("_", "-")
            plural = "sparsities" if key == "sparsity" else f"{word}s"
            parts.append(f"{count} {word if count == 1 else plural}")
    return " × ".join(parts) + "."


def _facts(results: StudyResults) -> Iterator[Fact]:
    count = Counter(case["status"] for case in results.cases)
    rest = [f"{count[s]} {s}" for s in (FAILED, MISSING) if count[s]]
    yield Fact("Cases done", f"{count[DONE]} of {len(results.cases)}", ", ".join(rest))
    columns = list(results.study["evaluations"]) if "evaluations" in results.study else []
    columns = columns or list(dict.fromkeys(k for c in results.cases for k in c["scores"]))
    yield Fact("Evaluations", str(len(columns)), ", ".join(columns))
    done = [case["seconds"] for case in results.cases if case["status"] == DONE]
    pruning = sum(s["prune"] or 0 for s in done)
    yield Fact("Time of pruning", duration(pruning), "all cases, each as if it ran alone")
    yield Fact("Time of evaluation", duration(sum(s["evaluate"] or 0 for s in done)), "all cases")


def _notes(results: StudyResults) -> Iterator[str]:
    failed = [case for case in results.cases if case["status"] == FAILED]
    for case in failed[:_NAMED]:
        yield f"{_case(case['case'])} failed: {case['error']}"
    if len(failed) > _NAMED:
        yield f"{len(failed)} cases failed in all"
    missing = sum(case["status"] == MISSING for case in results.cases)
    if missing:
        yield f"{missing} of {len(results.cases)} cases have not run: their cells are empty"
    for reason, count in Counter(s["reason"] for s in results.study["skipped"]).items():
        yield f"left out of the study, {count} {'case' if count == 1 else 'cases'}: {reason}"


def _case(labels: Mapping[str, Any]) -> str:
    if labels["pruner"] is None:
        return f"{labels['model']}, dense"
    method = f"{labels['pruner']} + {labels['top_up']}"
    return f"{labels['model']}, {method}, {percent(labels['sparsity'], 0)}, seed {labels['seed']}"


def _asked(results: StudyResults) -> Details:
    asked = _brief(results.study["study"]) | {"neuroal": results.study["neuroal"]}
    pairs = [
        (key, x if isinstance(x, str) else json.dumps(x, ensure_ascii=False))
        for key, x in asked.items()
    ]
    return Details("What was asked for", pairs=pairs)


def _brief(value: Any) -> Any:
    """Leave out what says nothing: empty values, and labels that repeat a name."""
    if isinstance(value, list):
        return [_brief(x) for x in value]
    if not isinstance(value, dict):
        return value
    brief = {key: _brief(x) for key, x in value.items() if x not in (None, {}, [])}
    named = brief.get("label")
    if named is not None and named in (brief.get("name"), brief.get("data")):
        del brief["label"]
    return next(iter(brief.values())) if brief.keys() in ({"name"}, {"data"}) else brief

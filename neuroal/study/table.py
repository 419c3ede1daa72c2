"""Tables of a study: mean and deviation over seeds, the best of each comparison marked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neuroal.study.results import DONE, StudyResults

Key = tuple[Any, ...]


@dataclass(frozen=True)
class MeanScore:
    """One score of one method on one model, over the seeds.

    Attributes:
        model: Its label; those of pruner and top-up, and the pattern, are None of a dense model.
        sparsity: Wanted; 0 of a dense model.
        evaluation: Column of the scores.
        metric: perplexity, acc, …
        mean: Over the seeds that are done; NaN where one is.
        deviation: Of the sample; None with fewer than two seeds, NaN where a value is not finite.
        seeds: How many are done.
        missing: How many are not.
        best: Whether no other top-up does better on the same model, pruner, pattern and sparsity
            (in a study with one top-up: no other pruner).
        seconds: Mean of the pruning; None of a dense model.
    """

    model: str
    pattern: str | None
    pruner: str | None
    top_up: str | None
    sparsity: float
    evaluation: str
    metric: str
    mean: float
    deviation: float | None
    seeds: int
    missing: int
    best: bool
    seconds: float | None


def cells(results: StudyResults) -> list[MeanScore]:
    """Return a cell for every evaluation of every case that has one, over the seeds together."""
    groups: dict[Key, list[Mapping[str, Any]]] = {}
    for case in results.cases:
        x = case["case"]
        key = (x["model"], x["pattern"], x["pruner"], x["top_up"], x["sparsity"])
        groups.setdefault(key, []).append(case)
    scores = []
    higher: dict[str, bool] = {}  # by column, whether higher is better
    for key, cases in groups.items():
        done = [case for case in cases if case["status"] == DONE]
        columns = {column: score for case in done for column, score in case["scores"].items()}
        for column, score in columns.items():
            higher[column] = score["higher_is_better"]
            values = [float(c["scores"][column]["value"]) for c in done if column in c["scores"]]
            times = [c["seconds"]["prune"] for c in done if c["report"] is not None]
            scores.append(
                MeanScore(
                    *key,
                    evaluation=column,
                    metric=score["metric"],
                    mean=statistics.fmean(values),
                    deviation=_deviation(values),
                    seeds=len(values),
                    missing=len(cases) - len(values),
                    best=False,
                    seconds=statistics.fmean(times) if times else None,
                )
            )
    return _marked(scores, higher)


def _deviation(values: Sequence[float]) -> float | None:
    """Return the deviation of the sample; NaN where a value is not finite."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _marked(scores: Sequence[MeanScore], higher: Mapping[str, bool]) -> list[MeanScore]:
    """Mark the best of the cells that compete; all of them where they are equal."""
    several = len({cell.top_up for cell in scores if cell.pruner is not None}) > 1

    def competition(cell: MeanScore) -> Key:
        pruner = cell.pruner if several else cell.pruner is not None
        return (cell.model, cell.pattern, pruner, cell.sparsity, cell.evaluation)

    best: dict[Key, float] = {}
    for cell in scores:
        key, sign = competition(cell), -1 if higher[cell.evaluation] else 1
        if not math.isnan(cell.mean):
            best[key] = sign * min(sign * best.get(key, cell.mean), sign * cell.mean)
    return [
        replace(cell, best=cell.pruner is not None and cell.mean == best.get(competition(cell)))
        for cell in scores
    ]

"""What a case is measured by: a score a column of the tables, each with its protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from neuroal.data.windows import Windows
from neuroal.evaluation.perplexity import perplexity, windows_for
from neuroal.evaluation.tasks import check_names, load_tasks
from neuroal.evaluation.text_overlap import warn_of_overlap
from neuroal.evaluation.zero_shot import ZeroShot, check_sizes, zero_shot
from neuroal.study.cases import file_sha256, source_identity
from neuroal.study.file import EvaluationEntry

T = TypeVar("T")
Scores = dict[str, dict[str, Any]]


def check(evaluation: EvaluationEntry) -> None:
    """Refuse tasks that are not there, and numbers that are none.

    Raises:
        UsageError: A task or a number is wrong, or the extra of tasks is not installed.
    """
    check_sizes(evaluation.batch, evaluation.limit)
    if evaluation.data is None:
        check_names(evaluation.tasks, evaluation.include_path)


def identity(evaluation: EvaluationEntry) -> str:
    """Return the SHA-256 of what decides an evaluation's scores and the columns they stand in."""
    decides = dataclasses.asdict(evaluation)
    del decides["batch"]
    decides["data"] = source_identity(evaluation.data)
    folder = evaluation.include_path
    if folder is not None:
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        decides["include_path"] = [[p.name, file_sha256(str(p))] for p in files]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def reusable(scores: Mapping[str, Any], key: str) -> Scores:
    """Return those scores by column that the evaluation of this `identity` would give again."""
    return {column: dict(score) for column, score in scores.items() if score["evaluation"] == key}


class Measurer:
    """Measures models of one tokenizer, and reads each text or task once."""

    def __init__(self, tokenizer: Any, progress: bool) -> None:
        self.tokenizer = tokenizer
        self.progress = progress
        self._read: dict[EvaluationEntry, Any] = {}
        self._compared: set[tuple[EvaluationEntry, str]] = set()

    def measure(self, evaluation: EvaluationEntry, model: nn.Module) -> Scores:
        """Return an evaluation's scores by column."""
        if evaluation.data is not None:
            scores = self._perplexity(evaluation, model)
        else:
            scores = self._zero_shot(evaluation, model)
        key = identity(evaluation)
        return {column: {**score, "evaluation": key} for column, score in scores.items()}

    def compare(self, evaluation: EvaluationEntry, model: nn.Module, calibration: Windows) -> None:
        """Warn, once, where a text shares sequences of tokens with calibration windows."""
        pair = (evaluation, calibration.sha256)
        if evaluation.data is not None and pair not in self._compared:
            self._compared.add(pair)
            warn_of_overlap(calibration, self.windows(evaluation, model))

    def windows(self, evaluation: EvaluationEntry, model: nn.Module) -> Windows:
        """Return the windows of an evaluation on a text, cut once."""
        cut = partial(
            windows_for,
            getattr(model, "config", None),
            str(evaluation.data),
            self.tokenizer,
            length=evaluation.length,
            windows=evaluation.windows,
            bos=evaluation.bos or "auto",
            pack_documents=evaluation.pack_documents,
            progress=self.progress,
        )
        return self._once(evaluation, cut)

    def _once(self, evaluation: EvaluationEntry, make: Callable[[], T]) -> T:
        if evaluation not in self._read:
            self._read[evaluation] = make()
        value: T = self._read[evaluation]
        return value

    def _perplexity(self, evaluation: EvaluationEntry, model: nn.Module) -> Scores:
        windows = self.windows(evaluation, model)
        start = time.perf_counter()
        result = perplexity(model, windows, batch=evaluation.batch, progress=self.progress)
        seconds, protocol = time.perf_counter() - start, result.to_json()
        value = protocol.pop("perplexity")
        return {evaluation.label: _score(value, "perplexity", False, None, seconds, protocol)}

    def _zero_shot(self, evaluation: EvaluationEntry, model: nn.Module) -> Scores:
        load = partial(load_tasks, evaluation.tasks, evaluation.include_path)
        tasks = self._once(evaluation, load)
        start = time.perf_counter()
        result = zero_shot(
            model,
            self.tokenizer,
            tasks,
            batch=evaluation.batch,
            limit=evaluation.limit,
            progress=self.progress,
        )
        return _scores_of_tasks(evaluation.label, result, time.perf_counter() - start)


def _scores_of_tasks(label: str, result: ZeroShot, seconds: float) -> Scores:
    """Return a score a task, and their mean where there are several."""
    whole = result.to_json()
    tasks, mean = whole.pop("tasks"), whole.pop("accuracy")
    scores = {}
    for name, task in tasks.items():
        metric = task["metric"]
        error = task.get(f"{metric}_stderr")
        share = seconds / len(tasks)
        scores[name] = _score(task[metric], metric, True, error, share, whole | task)
    if len(tasks) > 1 and mean is not None:
        scores[label] = _score(mean, "acc", True, None, 0.0, whole | {"tasks": list(tasks)})
    return scores


def _score(
    value: object,
    metric: str,
    higher_is_better: bool,
    stderr: float | None,
    seconds: float,
    protocol: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "value": value,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "stderr": stderr,
        "seconds": round(seconds, 4),
        "protocol": dict(protocol),
    }

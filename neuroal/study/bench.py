"""A bench runs cases one after the other and keeps ready what they have in common."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuroal import engine, layout
from neuroal.errors import NeuroalError
from neuroal.model import memory, pretrained
from neuroal.search.measurements import SharedMeasurements
from neuroal.study.cases import StudyCase
from neuroal.study.file import EvaluationEntry
from neuroal.study.results import DONE, FAILED, CaseResult
from neuroal.study.scores import Measurer, Scores, identity, reusable


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A model whose linears can be made dense again, and what its cases share.

    Attributes:
        key: Name, dtype and device that it was loaded by.
        model: As the last case has left it.
        weights: The dense parameters that hold linears, on the CPU.
        measurer: Holds evaluation windows and tasks.
        shared: Holds calibration windows and measurements of the dense model.
    """

    key: tuple[str, str, str]
    model: nn.Module
    tokenizer: Any
    weights: Mapping[str, Tensor]
    measurer: Measurer
    shared: SharedMeasurements = field(default_factory=SharedMeasurements)

    def restore(self) -> None:
        """Restore the dense weights after a case."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.model.get_parameter(name).copy_(weight)


class Bench:
    """Runs cases in one process; the model of the last one stays loaded."""

    def __init__(
        self,
        evaluations: Sequence[EvaluationEntry],
        trust_remote_code: bool,
        progress: bool = False,
    ) -> None:
        self.evaluations = {evaluation: identity(evaluation) for evaluation in evaluations}
        self.trust_remote_code = trust_remote_code
        self.progress = progress
        self._loaded: _Loaded | None = None

    def run(self, case: StudyCase, known: Mapping[str, Any]) -> CaseResult:
        """Run a case and return the content of its file; an exception makes it a failed one.

        What the scores `known` of an earlier run of it hold is not measured again.
        """
        try:
            return {**_head(case), "status": DONE, **self._outcome(case, known)}
        except Exception as error:
            return failure(case, error)

    def _outcome(self, case: StudyCase, known: Mapping[str, Any]) -> CaseResult:
        loaded = self._load(case)
        loaded.restore()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        report = None
        start = time.perf_counter()
        if case.recipe is not None:
            outcome = engine.prune(
                loaded.model,
                loaded.tokenizer,
                case.recipe,
                progress=self.progress,
                shared=loaded.shared,
            )
            outcome.model["sha256"] = case.model_sha256
            report = outcome.to_json()
            for calibration in loaded.shared.calibrations:
                for evaluation in self.evaluations:
                    loaded.measurer.compare(evaluation, loaded.model, calibration)
        pruned = time.perf_counter()
        scores: Scores = {}
        for evaluation, key in self.evaluations.items():
            scores |= reusable(known, key) or loaded.measurer.measure(evaluation, loaded.model)
        seconds = {"prune": pruned - start, "evaluate": time.perf_counter() - pruned}
        if report is not None:
            seconds["prune"] = sum(report["timings"].values())
        rounded = {phase: round(x, 4) for phase, x in seconds.items()}
        return {"scores": scores, "report": report, "seconds": rounded, "error": None}

    def _load(self, case: StudyCase) -> _Loaded:
        """Return the case's model; the previous one is released first."""
        key = (case.model, case.dtype, case.device)
        if self._loaded is None or self._loaded.key != key:
            self._loaded = None
            device = memory.device_of(case.device)
            model, tokenizer = pretrained.load(
                case.model, device, case.dtype, self.trust_remote_code
            )
            linears = layout.find(model).linears.values()
            names = {linear.place.parameter for linear in linears}
            dense = {name: model.get_parameter(name).detach().cpu().clone() for name in names}
            measurer = Measurer(tokenizer, self.progress)
            self._loaded = _Loaded(key, model, tokenizer, dense, measurer)
        return self._loaded


def failure(case: StudyCase, error: Exception) -> CaseResult:
    """Return the content of a failed case's file: the error in one line, and its traceback."""
    kind = "" if isinstance(error, NeuroalError) else f"{type(error).__name__}: "
    return {
        **_head(case),
        "status": FAILED,
        "scores": {},
        "report": None,
        "seconds": {},
        "error": kind + " ".join(str(error).split()),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _head(case: StudyCase) -> CaseResult:
    recipe = None if case.recipe is None else case.recipe.to_json()
    return {"id": case.id, "case": dict(case.labels), "recipe": recipe}

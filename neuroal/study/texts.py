"""What is known of a study's texts before it runs: the windows that every model would read."""

from __future__ import annotations

import os
from collections.abc import Iterator

from neuroal.data.source import parse_source
from neuroal.model import pretrained
from neuroal.run import windows
from neuroal.study.cases import StudyCase
from neuroal.study.file import EvaluationEntry, within
from neuroal.study.run import PreparedStudy
from neuroal.study.scores import Measurer

LARGE = 1 << 24  # bytes of a file that is not made tokens of for a plan


def look(prepared: PreparedStudy, trust_remote_code: bool = False) -> list[str]:
    """Take the windows of cases that are left, of texts that are at hand and not large.

    Returns:
        What should be known of them, one line each.

    Raises:
        NeuroalError: A text holds too little for a model, or the wrong thing.
    """
    notes: dict[str, None] = {}
    for number, model in enumerate(prepared.study.models, 1):
        cases = [case for case, _ in prepared.jobs if case.labels["model"] == model.label]
        if cases:
            with within(f"models[{number}] '{model.label}'"):
                found = _of_model(cases, prepared.study.evaluations, trust_remote_code)
                notes |= dict.fromkeys(f"{model.label}: {note}" for note in found)
    return list(notes)


def _of_model(
    cases: list[StudyCase], evaluations: tuple[EvaluationEntry, ...], trust: bool
) -> Iterator[str]:
    """Yield notes on the texts of one model; those of its first seed stand for all."""
    skeleton = pretrained.skeleton(cases[0].model, trust)
    tokenizer = pretrained.load_tokenizer(cases[0].model, trust)
    recipe = next((case.recipe for case in cases if case.recipe is not None), None)
    if recipe is not None and recipe.calibration is not None:
        if _is_large(recipe.calibration):
            yield f"'{recipe.calibration}' is large: its windows are cut by the run alone"
        else:
            yield from windows.look(recipe, skeleton, tokenizer).notes
    measurer = Measurer(tokenizer, progress=False)
    for evaluation in evaluations:
        source = evaluation.data
        if source is not None and not parse_source(source).on_hub and not _is_large(source):
            with within(f"evaluation '{evaluation.label}'"):
                measurer.windows(evaluation, skeleton)


def _is_large(text: str) -> bool:
    source = parse_source(text)
    return os.path.isfile(source.path) and os.path.getsize(source.path) > LARGE

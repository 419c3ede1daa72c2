"""How long the rest will take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare
from neuroal.model import pretrained
from neuroal.study import estimate as module
from neuroal.study.estimate import estimate
from neuroal.study.results import CaseResult
from neuroal.study.run import PreparedStudy

Change = Callable[..., PreparedStudy]


def test_a_new_study_is_judged_by_its_models_pace(
    prepared: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block runs over blocks times the windows' tokens; here a token takes a second."""
    monkeypatch.setattr(module._ForwardSpeed, "_per_token", 1.0)
    what = prepared()
    found = estimate(what.jobs, what.study.evaluations, ())
    recipes = [case.recipe for case, _ in what.jobs if case.recipe is not None]
    blocks, length, context = 2, 16, 64
    config = pretrained.load_config("llama")
    context = pretrained.context_length(config) or 0
    runs = sum(plan(prepare(recipe)).block_runs for recipe in recipes)
    texts = 8 * length + 3 * length  # rows, and windows of text
    assert found.seconds == pytest.approx(runs / blocks * min(2048, context) + 18 * texts)
    assert (found.timed, found.unknown) == (18, ())


def test_finished_cases_tell_more(prepared: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same method at another sparsity takes as long."""
    what = prepared()
    keys = module.identity(what.study.evaluations[0]), module.identity(what.study.evaluations[1])

    def result(number: int, seconds: float) -> CaseResult:
        case = what.expansion.cases[number]
        scores = {
            name: {"evaluation": key, "seconds": s}
            for name, key, s in zip(("rows", "text"), keys, (1.0, 2.0), strict=True)
        }
        done: dict[str, Any] = {"status": "done", "case": case.labels, "scores": scores}
        return done | {"seconds": {"prune": seconds}}

    known = [result(0, 0.0), result(1, 5.0), result(2, 7.0)]  # dense; magnitude + uniform, twice
    monkeypatch.setattr(pretrained, "load", None)  # nothing is timed
    found = estimate([(what.expansion.cases[2], {})], what.study.evaluations, known)
    assert (found.seconds, found.timed) == (6.0 + 3.0, 0)
    half = {"rows": {"evaluation": keys[0]}}  # is not measured again
    found = estimate([(what.expansion.cases[0], half)], what.study.evaluations, known)
    assert (found.seconds, found.timed) == (2.0, 0)


def test_zero_shot_is_unknown_at_first(prepared: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._ForwardSpeed, "_per_token", 1.0)
    what = prepared()
    (tasks,) = what.study.evaluations[:0] or [module.EvaluationEntry(tasks=("rte",), label="rte")]
    found = estimate(what.jobs[:1], [tasks], ())
    assert (found.seconds, found.timed, found.unknown) == (0.0, 1, ("rte",))

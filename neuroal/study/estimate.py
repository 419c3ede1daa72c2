"""How long the rest of a study will take: from its finished cases, else from a timed model."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from neuroal.cost.estimate import work
from neuroal.cost.preparation import prepare
from neuroal.cost.timings import time_forward
from neuroal.data.sizes import default_length
from neuroal.layout import Layout, find
from neuroal.model import memory, pretrained
from neuroal.progress import bar
from neuroal.study.cases import StudyCase
from neuroal.study.executors import Job
from neuroal.study.file import EvaluationEntry
from neuroal.study.results import DONE, CaseResult
from neuroal.study.scores import Measurer, identity, reusable


@dataclass(frozen=True)
class StudyTime:
    """Seconds of the cases that are left, one after the other.

    Attributes:
        seconds: Of all of them, but for what is unknown.
        timed: Number of cases of which a part at least was judged by the speed of the dense model,
            which leaves out the time for masks and updates; the others by finished cases alone.
        extrapolated: Whether a part of a block was timed for the speed of a model.
        unknown: Labels of evaluations that are not in the seconds: zero-shot tasks that no finished
            case of the model has.
    """

    seconds: float
    timed: int
    unknown: tuple[str, ...]
    extrapolated: bool = False


def estimate(
    jobs: Sequence[Job],
    evaluations: Sequence[EvaluationEntry],
    known: Iterable[CaseResult],
    trust_remote_code: bool = False,
    progress: bool = False,
) -> StudyTime:
    """Return how long jobs will take, going by what has become of cases so far (`known`).

    Of models of which too little is known one block is timed, within seconds.
    """
    keys = {e: identity(e) for e in evaluations}
    pruning, evaluating = _mean_seconds(r for r in known if r["status"] == DONE)
    speeds: dict[tuple[str, str, str], _ForwardSpeed] = {}
    seconds, timed = 0.0, 0
    unknown: dict[str, None] = {}
    for case, scores in bar(iterable=jobs, desc="estimate", disable=not progress, leave=False):
        model = (case.model, case.dtype, case.device)
        speed = speeds.setdefault(model, _ForwardSpeed(*model, trust_remote_code))
        parts: dict[EvaluationEntry | None, float | None] = {  # None is the pruning
            None: 0.0 if case.recipe is None else pruning.get(_method(case.labels))
        }
        for evaluation, key in keys.items():
            if not reusable(scores, key):
                parts[evaluation] = evaluating.get((case.labels["model"], key))
        timed += None in parts.values()
        for part, mean in parts.items():
            if mean is not None:
                seconds += mean
            elif part is not None and part.data is None:
                unknown[part.label] = None
            else:
                seconds += speed.of(case, part)
    extrapolated = any(speed.extrapolated for speed in speeds.values())
    return StudyTime(seconds, timed, tuple(unknown), extrapolated)


def _method(labels: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides how long pruning takes: neither sparsity nor seed does."""
    return tuple(labels[key] for key in ("model", "pruner", "top_up", "pattern"))


def _mean_seconds(
    done: Iterable[CaseResult],
) -> tuple[dict[tuple[Any, ...], float], dict[tuple[str, str], float]]:
    """Return mean seconds of pruning by `_method`, and of evaluating by model and evaluation."""
    pruning = defaultdict(list)
    evaluating = defaultdict(list)
    for result in done:
        pruning[_method(result["case"])].append(result["seconds"]["prune"])
        by_key: dict[str, float] = defaultdict(float)
        for score in result["scores"].values():
            by_key[score["evaluation"]] += score["seconds"]
        for key, seconds in by_key.items():
            evaluating[result["case"]["model"], key].append(seconds)
    return (
        {method: statistics.fmean(x) for method, x in pruning.items()},
        {key: statistics.fmean(x) for key, x in evaluating.items()},
    )


@dataclass(eq=False)
class _ForwardSpeed:
    """How fast a dense model reads, known once it is asked for."""

    model: str
    dtype: str
    device: str
    trust_remote_code: bool
    extrapolated: bool = False
    _tokens: dict[EvaluationEntry | str, float] = field(
        default_factory=dict
    )  # str: a recipe's digest

    def of(self, case: StudyCase, evaluation: EvaluationEntry | None) -> float:
        """Return the seconds of an evaluation on a text; where None is given, of the pruning."""
        if evaluation is not None:
            if evaluation not in self._tokens:
                tokenizer = pretrained.load_tokenizer(self.model, self.trust_remote_code)
                windows = Measurer(tokenizer, False).windows(evaluation, self._skeleton)
                self._tokens[evaluation] = windows.ids.numel()
            return self._tokens[evaluation] * self._per_token
        assert case.recipe is not None
        recipe = dataclasses.replace(case.recipe, seed=0)  # which the work does not depend on
        key = recipe.digest()
        if key not in self._tokens:
            prepared = prepare(recipe, self._skeleton, layout=self._layout)
            block_runs = sum(phase.block_runs for phase in work(prepared).values())
            self._tokens[key] = block_runs / len(prepared.layout.blocks) * prepared.length
        return self._tokens[key] * self._per_token

    @cached_property
    def _skeleton(self) -> Any:
        return pretrained.skeleton(self.model, self.trust_remote_code)

    @cached_property
    def _layout(self) -> Layout:
        return find(self._skeleton)

    @cached_property
    def _per_token(self) -> float:
        """The seconds per token of a forward pass."""
        config = self._skeleton.config
        length = default_length(pretrained.context_length(config))
        device = memory.device_of(self.device)
        timed = time_forward(self.model, device, self.dtype, length, self.trust_remote_code)
        self.extrapolated |= timed.extrapolated
        head = timed.seconds["head"] * (pretrained.vocabulary_size(config) or 0)
        return (timed.seconds["block"] * len(self._layout.blocks) + head) / length

"""Zero-shot accuracy through lm-eval, the harness of the field.

A model in memory is wrapped as the harness's own and asked its questions, so that every number is
the one that `lm_eval` gives on the saved folder. The harness is an extra, imported when used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from neuroal.data.source import quiet_datasets
from neuroal.errors import NeuroalError, UsageError
from neuroal.evaluation.perplexity import evaluating
from neuroal.evaluation.tasks import Tasks, quiet_harness

LOG = logging.getLogger(__name__)

BATCH = 8


@dataclass(frozen=True)
class TaskScore:
    """What the harness reports for one task.

    Attributes:
        name: Of the task.
        metrics: By name, such as acc and acc_norm, each followed by its `_stderr` if it has one.
        metric: The one that counts: the first that the task's definition lists.
        examples: How many documents were asked.
        few_shot: Solved examples in front of each.
        version: Of the task's definition.
        sha256: Of prompts, answers and targets, in order: the same for every model.
    """

    name: str
    metrics: Mapping[str, float]
    metric: str
    examples: int
    few_shot: int
    version: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, but for the name: first the metrics, each by its name."""
        values = asdict(self)
        del values["name"]
        return {**values.pop("metrics"), **values}


@dataclass(frozen=True)
class ZeroShot:
    """Scores of a model and the protocol that they were measured by.

    Attributes:
        tasks: One score a task; those of a group one by one.
        groups: The groups' own metrics, as the harness averages them.
        harness: Name and version.
        limit: Documents asked of each task; None is all of them.
        batch: Requests per forward pass.
        dtype: Of the model's weights.
    """

    tasks: tuple[TaskScore, ...]
    groups: Mapping[str, Mapping[str, float]]
    harness: str
    limit: int | None
    batch: int
    dtype: str

    @property
    def accuracy(self) -> float | None:
        """The mean over the tasks whose metric is an accuracy; None where none is."""
        accuracies = [x.metrics[x.metric] for x in self.tasks if x.metric.startswith("acc")]
        return math.fsum(accuracies) / len(accuracies) if accuracies else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        tasks = {x.name: x.to_json() for x in self.tasks}
        groups = {"groups": {k: dict(v) for k, v in self.groups.items()}} if self.groups else {}
        return {
            "tasks": tasks,
            **groups,
            "accuracy": self.accuracy,
            "harness": self.harness,
            "limit": self.limit,
            "batch": self.batch,
            "dtype": self.dtype,
        }


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    *,
    batch: int | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> ZeroShot:
    """Measure a model in memory on tasks.

    Args:
        model: A causal language model of transformers, on any device and in any dtype.
        tokenizer: The model's.
        tasks: Of `load_tasks`.
        batch: Requests per forward pass; None is 8.
        limit: Ask only this many documents of each task, from the first: for trying things out.
        progress: Show bars.

    Returns:
        The scores with their protocol.

    Raises:
        UsageError: `batch` or `limit` is less than 1.
        NeuroalError: There is no tokenizer.
    """
    check_sizes(batch, limit)
    check_tokenizer(tokenizer)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    batch = batch or BATCH
    with evaluating(model), quiet_datasets(progress):
        with quiet_harness(progress):
            # A copy, for the harness gives a tokenizer without a padding token one.
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
        with quiet_harness(progress) as warnings:
            results = lm_eval.evaluate(wrapped, dict(tasks.loaded), limit=limit, log_samples=True)
    _pass_on(warnings)
    scores = tuple(_score(name, task, results) for name, task in tasks.loaded["tasks"].items())
    for task in tasks.loaded["tasks"].values():
        task._instances = None  # requests and answers, no longer needed
    return ZeroShot(
        tasks=scores,
        groups={name: _metrics(values) for name, values in results.get("groups", {}).items()},
        harness=f"lm-eval {lm_eval.__version__}",
        limit=limit,
        batch=batch,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def check_sizes(batch: int | None, limit: int | None) -> None:
    """Raise a `UsageError` for a batch or a limit that is not positive."""
    for what, value in (("batch", batch), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{what} {value} is not a positive number")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a `NeuroalError` where the model has no tokenizer."""
    if tokenizer is None:
        raise NeuroalError("the model has no tokenizer to read zero-shot tasks with")


def _score(name: str, task: Any, results: Mapping[str, Any]) -> TaskScore:
    samples, metrics = results["samples"][name], _metrics(results["results"][name])
    asked = [[x["doc_id"], x["arguments"], x["target"]] for x in samples]
    text = json.dumps(asked, ensure_ascii=False, default=str)
    unsound = sum(_unsound(x["resps"]) for x in samples)
    if unsound:
        LOG.warning("%d of %d answers to '%s' are not finite", unsound, len(samples), name)
    listed = [x["metric"] for x in task.get_config("metric_list") or ()]
    return TaskScore(
        name=name,
        metrics=metrics,
        metric=next((x for x in (*listed, *metrics) if x in metrics), ""),
        examples=results["n-samples"][name]["effective"],
        few_shot=results["n-shot"][name],
        version=str(results["versions"][name]),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _unsound(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_unsound, value))
    return isinstance(value, float) and not math.isfinite(value)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by metric; the harness's key is `metric,filter`, its filter mostly "none"."""
    metrics = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, (int, float)) and math.isfinite(value):
            name = metric.removesuffix("_stderr")
            suffix = "_stderr" if name != metric else ""
            metrics[f"{name}{'' if kind == 'none' else f',{kind}'}{suffix}"] = float(value)
    return metrics


def _pass_on(warnings: Sequence[logging.LogRecord]) -> None:
    """Log the harness's warnings, one line for all of a kind."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for record in warnings:
        kinds.setdefault((record.pathname, record.lineno), []).append(record.getMessage())
    for messages in kinds.values():
        more = f" (and {len(messages) - 1} more like this)" if len(messages) > 1 else ""
        LOG.warning("lm-eval: %s%s", " ".join(messages[0].split()), more)

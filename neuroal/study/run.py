"""Run what is left of a study: a finished case never again, a failed one once more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from neuroal.errors import UsageError, nearest
from neuroal.model import memory
from neuroal.model.output import one_writer
from neuroal.plugins import in_file, refuse_code_of
from neuroal.recipe import TOP_UP_ROLES
from neuroal.study import results
from neuroal.study.bench import Bench
from neuroal.study.cases import Expansion, expand, title
from neuroal.study.executors import Job, local, run_on
from neuroal.study.file import Study, within
from neuroal.study.mistakes import read_checked
from neuroal.study.results import DONE, CaseResult
from neuroal.study.scores import check, identity, reusable

LOG = logging.getLogger(__name__)

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class PreparedStudy:
    """A study that has been read and checked, and what is left of it.

    Attributes:
        name: Of the file, without its ending.
        out: The results folder.
        jobs: The cases to run, with the scores of each that are known.
        known: What has become of cases so far.
    """

    name: str
    out: Path
    study: Study
    expansion: Expansion
    jobs: tuple[Job, ...]
    known: tuple[CaseResult, ...]

    @property
    def finished(self) -> int:
        """Return how many cases need not run."""
        return len(self.expansion.distinct) - len(self.jobs)


def prepare(
    file: Path, out: Path, trust_remote_code: bool = False, allow_plugin_files: bool = False
) -> PreparedStudy:
    """Read a study file and check everything that can be checked before a weight or a text is read.

    A case is left to run if it has no file in the results folder `out`, has failed, or lacks a
    score.

    Args:
        file: The study file.
        out: The results folder.
        trust_remote_code: Let models' own code run.
        allow_plugin_files: Let the code of files run that the study file names.

    Raises:
        UsageError: The file or the folder is wrong.
        NeuroalError: A model's structure cannot be read, or a plugin is broken.
    """
    study = read_checked(file)
    if not allow_plugin_files:
        refuse_code_of(str(file), _code_files(study))
    results.check_folder(out)
    with within(f"study '{file}'"):
        for number, evaluation in enumerate(study.evaluations, 1):
            with within(f"evaluations[{number}]"):
                check(evaluation)
        expansion = expand(study, trust_remote_code)
    known = results.earlier(out, expansion.distinct)
    keys = [identity(evaluation) for evaluation in study.evaluations]
    jobs: list[Job] = []
    for case in expansion.distinct:
        earlier = known.get(case.id, {"status": None, "scores": {}})
        scores = earlier["scores"]
        if earlier["status"] != DONE or not all(reusable(scores, key) for key in keys):
            jobs.append((case, scores))
    return PreparedStudy(file.stem, out, study, expansion, tuple(jobs), tuple(known.values()))


def _code_files(study: Study) -> Iterator[str]:
    """Yield the plugins' files and the folders of task definitions that a study names."""
    for pruner in study.pruners:
        yield from filter(in_file, (pruner.name,))
    for top_up in study.top_ups:
        choices = [top_up.name]
        for role in TOP_UP_ROLES:
            choice = getattr(top_up, role)
            choices += choice if isinstance(choice, tuple) else [choice]
        yield from (x for x in choices if x is not None and in_file(x))
    yield from (e.include_path for e in study.evaluations if e.include_path is not None)


@dataclass(frozen=True)
class Execution:
    """Where and how cases run.

    Attributes:
        executor: "local" or "ray".
        jobs: How many at once; None is one here, and as many as there is room for on Ray.
        gpus_per_case: On Ray, a fraction where several cases share a GPU.
        trust_remote_code: Let models' own code run.
        progress: Show the progress within a case, where cases run in this process.
    """

    executor: str = "local"
    jobs: int | None = None
    gpus_per_case: float = 0.0
    trust_remote_code: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UsageError(
                f"executor '{self.executor}' is unknown: {nearest(self.executor, EXECUTORS)}"
            )
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"{self.jobs} jobs are too few: give at least 1")
        if self.gpus_per_case < 0:
            raise UsageError(f"{self.gpus_per_case} GPUs per case are too few: give 0 or more")
        if self.gpus_per_case > 1 and not self.gpus_per_case.is_integer():
            raise UsageError(
                f"{self.gpus_per_case} GPUs per case: give a fraction of one, or a whole number"
            )
        if self.gpus_per_case and self.executor != "ray":
            raise UsageError("--gpus-per-case is for --executor ray")


def run(prepared: PreparedStudy, execution: Execution) -> Iterator[CaseResult]:
    """Run the cases that are left; write the file of each as soon as it is done, and yield it.

    Raises:
        UsageError: Another process runs a study in the results folder.
    """
    with one_writer(prepared.out, in_place=True):
        results.begin(prepared.out, prepared.name, prepared.study, prepared.expansion)
        for result in _results(prepared, execution):
            results.write_case(prepared.out, result)
            said = ", ".join(f"{name} {x['value']}" for name, x in result["scores"].items())
            LOG.info("%s: %s", title(result["case"]), result["error"] or said)
            yield result


def _results(prepared: PreparedStudy, execution: Execution) -> Iterator[CaseResult]:
    make_bench = partial(Bench, prepared.study.evaluations, execution.trust_remote_code)
    jobs = prepared.jobs
    if not jobs:
        return
    if execution.executor == "ray":
        from neuroal.study.cluster import on_ray

        with on_ray(make_bench, execution.jobs, execution.gpus_per_case) as executor:
            yield from run_on(executor, jobs)
        return
    memory.device_of(prepared.study.device)
    if execution.jobs is None or execution.jobs == 1:
        bench = make_bench(execution.progress)
        yield from (bench.run(case, known) for case, known in jobs)
    else:
        yield from run_on(local(make_bench, execution.jobs), jobs)

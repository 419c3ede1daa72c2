"""Where cases run: in this process, in several of this machine, or on a Ray cluster.

An executor makes workers, each with a bench of its own; `run_on` gives them cases, preferably
of the model that a worker has loaded. The case of a worker that dies is run by another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from neuroal.errors import NeuroalError
from neuroal.study.bench import Bench, failure
from neuroal.study.cases import StudyCase
from neuroal.study.results import CaseResult

LOG = logging.getLogger(__name__)

TRIES = 3
PATIENCE = 5.0  # seconds without news after which an executor is asked whether any can come
Job = tuple[StudyCase, Mapping[str, Any]]
"""A case, and the scores of it that are known."""


class Worker(Protocol):
    """A process somewhere that runs cases one by one."""

    def ready(self) -> Future[Any]:
        """Return what is done once the worker can take a case."""

    def submit(self, job: Job) -> Future[CaseResult]:
        """Run a case."""

    def close(self) -> None:
        """End the process."""


@dataclass(frozen=True)
class Executor:
    """A kind of worker.

    Attributes:
        workers: How many there may be.
        start: Starts one.
        lost: What a future raises where its worker has died.
        check: Raises where no worker can start any more; asked while nothing happens.
    """

    workers: int
    start: Callable[[], Worker]
    lost: tuple[type[BaseException], ...]
    check: Callable[[], None] = lambda: None


def run_here(bench: Bench, jobs: Sequence[Job]) -> Iterator[CaseResult]:
    """Run cases one by one in this process."""
    for case, known in jobs:
        yield bench.run(case, known)


def run_on(executor: Executor, jobs: Sequence[Job]) -> Iterator[CaseResult]:
    """Run cases on an executor's workers and yield their results as they come.

    Args:
        executor: Starts the workers, and new ones for those that die.
        jobs: In the order in which they are preferred.

    Raises:
        NeuroalError: Workers die before they can take a case, or none can start any more.
    """
    queue = _Queue(list(jobs))
    busy: dict[Future[Any], tuple[Worker, Job | None]] = {}
    idle: list[tuple[Worker, str | None]] = []  # with the model of its last case
    workers = min(executor.workers, len(jobs))
    stillborn = 0  # since the last sign of life: a node that dies may take several at once

    def start() -> None:
        worker = executor.start()
        busy[worker.ready()] = (worker, None)

    try:
        for _ in range(workers):
            start()
        while queue.jobs or any(job for _, job in busy.values()):
            done = wait(busy, PATIENCE, FIRST_COMPLETED).done
            if not done:
                executor.check()
            for future in done:
                worker, job = busy.pop(future)
                error = future.exception()
                if not isinstance(error, executor.lost):
                    stillborn = 0
                    idle.append((worker, None if job is None else job[0].model))
                    result = future.result()
                    if job is not None:
                        yield result
                    continue
                worker.close()
                stillborn += job is None
                if stillborn == TRIES * workers:
                    raise NeuroalError(f"the workers do not start: {error}") from error
                failed = None if job is None else queue.give_back(job, error)
                if failed is not None:
                    yield failed
                start()
            while queue.jobs and idle:
                worker, model = idle.pop()
                job = queue.take(model)
                busy[worker.submit(job)] = (worker, job)
    finally:
        for worker, _ in [*busy.values(), *idle]:
            worker.close()


@dataclass(eq=False)
class _Queue:
    """Jobs that wait, and how often each has been tried."""

    jobs: list[Job]
    tries: dict[str, int] = field(default_factory=dict)

    def take(self, model: str | None) -> Job:
        """Return the next job, of `model` if there is one."""
        job = next((j for j in self.jobs if j[0].model == model), self.jobs[0])
        self.jobs.remove(job)
        self.tries[job[0].id] = self.tries.get(job[0].id, 0) + 1
        return job

    def give_back(self, job: Job, error: BaseException) -> CaseResult | None:
        """Put a job back whose worker has died; after too many tries return its failure."""
        case = job[0]
        LOG.warning("the worker of '%s' died: %s", case.title, error)
        if self.tries[case.id] < TRIES:
            self.jobs.insert(0, job)
            return None
        why = f"its worker died {TRIES} times: where memory is short, give fewer --jobs"
        lost = NeuroalError(why)
        lost.__cause__ = error
        return failure(case, lost)

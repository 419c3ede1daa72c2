"""Where cases run: in processes of this machine, or (`cluster`) on a Ray cluster.

An executor makes workers, each with a bench of its own; `run_on` gives them cases, preferably
of the model that a worker has loaded. The case of a worker that dies is run by another.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from neuroal.errors import NeuroalError
from neuroal.study.bench import Bench, failure
from neuroal.study.cases import StudyCase
from neuroal.study.results import CaseResult

LOG = logging.getLogger(__name__)

_bench: Bench  # of a worker's process

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


def run_on(executor: Executor, jobs: Sequence[Job]) -> Iterator[CaseResult]:
    """Run cases on an executor's workers, those in front first; yield results as they come.

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


def local(make_bench: Callable[[], Bench], jobs: int) -> Executor:
    """Return an executor of `jobs` processes, which share the threads of this one.

    A worker makes its bench in its own process: `make_bench` can be pickled.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")

    def start() -> _Process:
        pool = ProcessPoolExecutor(1, spawn, _begin, (make_bench, threads))
        return _Process(pool, pool.submit(os.getpid))

    return Executor(jobs, start, (BrokenProcessPool,))


@dataclass(frozen=True, eq=False)
class _Process:
    """A pool of one process: where that dies, no other breaks, and its case is known."""

    pool: ProcessPoolExecutor
    pid: Future[int] = field(repr=False)

    def ready(self) -> Future[int]:
        return self.pid

    def submit(self, job: Job) -> Future[CaseResult]:
        try:
            return self.pool.submit(_run, job)
        except BrokenProcessPool as error:  # it died between two cases
            lost: Future[CaseResult] = Future()
            lost.set_exception(error)
            return lost

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.pid.done() and self.pid.exception() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid.result(), signal.SIGTERM)


def _begin(make_bench: Callable[[], Bench], threads: int) -> None:
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer, which ends its workers
    threading.Thread(target=_follow_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    _bench = make_bench()


def _follow_parent() -> None:
    """End this process when its parent ends, for whatever reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(job: Job) -> CaseResult:
    return _bench.run(*job)

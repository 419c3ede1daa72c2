"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial

import torch

from neuroal.study.bench import Bench
from neuroal.study.executors import Executor, Job
from neuroal.study.results import CaseResult

_bench: Bench  # of a worker's process


def local(make_bench: Callable[[], Bench], jobs: int) -> Executor:
    """Return an executor of `jobs` processes, which share the threads of this one.

    Args:
        make_bench: Makes a worker's bench in its own process; can be pickled.
        jobs: How many.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    return Executor(jobs, partial(_start, make_bench, threads), (BrokenProcessPool,))


def _start(make_bench: Callable[[], Bench], threads: int) -> _Process:
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _begin, (make_bench, threads)
    )
    return _Process(pool, pool.submit(os.getpid))


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

"""Workers that are actors of a Ray cluster; the only door to `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from neuroal.errors import UsageError
from neuroal.plugins import trust
from neuroal.study.bench import Bench
from neuroal.study.executors import Executor, Job
from neuroal.study.results import Result


@contextmanager
def on_ray(
    make_bench: Callable[[], Bench], jobs: int | None, gpus_per_case: float
) -> Iterator[Executor]:
    """Join the Ray cluster that `RAY_ADDRESS` or this machine names, or start one here.

    Models, texts and plugin files are read by the workers: by the same paths on every node.

    Args:
        make_bench: Makes a worker's bench, where it runs; can be pickled.
        jobs: At most so many workers; None is as many as the cluster's devices hold.
        gpus_per_case: GPUs of each, a fraction where several are to share one; 0 is none, and a
            CPU each.

    Raises:
        UsageError: Ray is not installed, or the cluster has no room for a worker.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--executor ray needs Ray: pip install 'neuroal[ray]'") from error

    own = not ray.is_initialized()
    if own:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        room = ray.cluster_resources()
        each = {"GPU": gpus_per_case} if gpus_per_case else {"CPU": 1.0}
        most = min(int(room.get(kind, 0) / share) for kind, share in each.items())
        if not most:
            needed = ", ".join(f"{share:g} {kind}" for kind, share in each.items())
            raise UsageError(f"the Ray cluster has no room for a case, which takes {needed}")
        names = (trust.ENVIRONMENT, "HF_HUB_OFFLINE")
        variables = {name: os.environ[name] for name in names if name in os.environ}
        actor = ray.remote(
            num_cpus=each.get("CPU", 0),
            num_gpus=gpus_per_case,
            runtime_env={"env_vars": variables},
        )(_Bench)
        errors = ray.exceptions
        lost = (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError)
        start = lambda: _Actor(ray, actor.remote(make_bench))  # noqa: E731
        yield Executor(min(jobs or most, most), start, lost)
    finally:
        if own:
            ray.shutdown()


class _Bench:
    """The actor."""

    def __init__(self, make_bench: Callable[[], Bench]) -> None:
        self.bench = make_bench()

    def ready(self) -> None:
        """Answer once the actor runs."""

    def run(self, job: Job) -> Result:
        return self.bench.run(*job)


@dataclass(frozen=True, eq=False)
class _Actor:
    """An actor as seen from the driver."""

    ray: Any
    handle: Any

    def ready(self) -> Future[Any]:
        future: Future[Any] = self.handle.ready.remote().future()
        return future

    def submit(self, job: Job) -> Future[Result]:
        future: Future[Result] = self.handle.run.remote(job).future()
        return future

    def close(self) -> None:
        self.ray.kill(self.handle)

"""Workers that are actors of a Ray cluster; the only door to `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from neuroal.errors import NeuroalError, UsageError
from neuroal.plugins import trust
from neuroal.study.bench import Bench
from neuroal.study.executors import Executor, Job
from neuroal.study.results import CaseResult


@contextmanager
def on_ray(
    make_bench: Callable[[], Bench], jobs: int | None, gpus_per_case: float
) -> Iterator[Executor]:
    """Join the Ray cluster that `RAY_ADDRESS` or this machine names, or start one here.

    Models, texts and plugin files are read by the workers: by the same paths on every node, and
    those that are relative from the folder that is the current one here. A worker makes its bench
    where it runs: `make_bench` can be pickled. There are at most `jobs`, or where that is None as
    many as the cluster's devices hold, each with `gpus_per_case` (a fraction where several are to
    share one), or with a CPU and no GPU for 0.

    Raises:
        UsageError: Ray is not installed, or no node has room for a worker.
        NeuroalError: The cluster does not answer, or loses every node with room meanwhile.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--executor ray needs Ray: pip install 'neuroal[ray]'") from error

    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # one started here would report home
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        except ConnectionError as error:
            where = "start it, or set RAY_ADDRESS to one that runs"
            raise NeuroalError(f"no Ray cluster answers: {error}: {where}") from error
    try:
        needed = f"{gpus_per_case:g} GPU" if gpus_per_case else "1 CPU"
        most = _room(ray, gpus_per_case)
        if not most:
            raise UsageError(
                f"no node of the Ray cluster has room for a case, which takes {needed}"
            )
        names = (trust.ENVIRONMENT, "HF_HUB_OFFLINE")
        variables = {name: os.environ[name] for name in names if name in os.environ}
        actor = ray.remote(
            num_cpus=0 if gpus_per_case else 1,
            num_gpus=gpus_per_case,
            runtime_env={"env_vars": variables},
        )(_RemoteBench)
        errors = ray.exceptions
        lost = (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError)

        def start() -> _Actor:
            return _Actor(ray, actor.remote(make_bench, os.getcwd()))

        def check() -> None:
            if not _room(ray, gpus_per_case):
                raise NeuroalError(
                    "the Ray cluster has lost every node with room for a case, which takes "
                    f"{needed}; the same command goes on once there are others"
                )

        yield Executor(min(jobs or most, most), start, lost, check)
    finally:
        if own:
            ray.shutdown()


def _room(ray: Any, gpus_per_case: float) -> int:
    """Return how many workers the living nodes hold: none spans two nodes, no fraction two GPUs.

    A node that was killed counts until Ray has missed its heartbeats, some 15 seconds later.
    """
    room = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        if gpus_per_case == 0:
            room += int(has.get("CPU", 0))
        elif gpus_per_case < 1:
            room += int(has.get("GPU", 0)) * int(1 / gpus_per_case)
        else:
            room += int(has.get("GPU", 0) / gpus_per_case)
    return room


class _RemoteBench:
    """The actor; it works in the driver's current folder, where its node has that."""

    def __init__(self, make_bench: Callable[[], Bench], folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        self.bench = make_bench()

    def ready(self) -> None:
        """Answer once the actor runs."""

    def run(self, job: Job) -> CaseResult:
        return self.bench.run(*job)


@dataclass(frozen=True, eq=False)
class _Actor:
    """An actor as seen from the driver."""

    ray: Any
    handle: Any

    def ready(self) -> Future[Any]:
        future: Future[Any] = self.handle.ready.remote().future()
        return future

    def submit(self, job: Job) -> Future[CaseResult]:
        future: Future[CaseResult] = self.handle.run.remote(job).future()
        return future

    def close(self) -> None:
        self.ray.kill(self.handle)

"""Workers: the same results from several processes, and none lost with a worker that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from neuroal.errors import NeuroalError
from neuroal.study import executors
from neuroal.study.bench import Bench
from neuroal.study.executors import TRIES, Executor, Job, local, run_on
from neuroal.study.results import CaseResult
from neuroal.study.run import PreparedStudy

Change = Callable[..., PreparedStudy]
Finish = Callable[..., list[CaseResult]]
HANGS = 1800  # seconds: for what can only hang
SMALL = (('models = ["llama", "opt"]', 'models = ["opt"]'), ("[0.5, 0.7]", "[0.5]"))
KILLS = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight):
        deaths = Path({folder!r}, "deaths")
        died = len(deaths.read_text()) if deaths.exists() else 0
        if died < {times}:
            deaths.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return weight.abs()
"""


def values(results: list[CaseResult]) -> dict[str, dict[str, Any]]:
    return {r["id"]: {n: s["value"] for n, s in r["scores"].items()} for r in results}


def test_processes_give_the_same_and_lose_nothing(
    prepared: Change, finish: Finish, desk: Path
) -> None:
    """A worker is killed in the middle of a case, which another one runs again."""
    (desk / "mine.py").write_text(KILLS.format(folder=str(desk), times=1))
    what = prepared(*SMALL, ('"magnitude"', '"mine.py:Mine"'))
    together = finish(what, jobs=2)
    assert (desk / "deaths").read_text() == "x"
    assert [r["status"] for r in together] == ["done"] * 5
    for path in (desk / "out/cases").iterdir():
        path.unlink()
    assert values(together) == values(finish(prepared()))  # in this process, where nobody dies


def test_a_process_that_dies_between_two_cases_loses_none(
    prepared: Change, request: pytest.FixtureRequest
) -> None:
    made = local(partial(Bench, (), False), 1)
    worker = made.start()
    request.addfinalizer(worker.close)
    os.kill(worker.ready().result(HANGS), signal.SIGKILL)
    pool = worker.pool  # type: ignore[attr-defined]
    with pytest.raises(made.lost):  # what is under way when its death is noticed
        pool.submit(time.sleep, 2 * HANGS).result(HANGS)
    assert isinstance(worker.submit(prepared(*SMALL).jobs[0]).exception(HANGS), made.lost)


@dataclass
class Fake:
    """A worker that answers at once with the case's title, or dies as told."""

    dies: Callable[[Job | None], bool] = lambda job: False
    seen: list[Job] = field(default_factory=list)
    closed: bool = False

    def _answer(self, job: Job | None) -> Future[Any]:
        future: Future[Any] = Future()
        if self.dies(job):
            future.set_exception(EOFError("gone"))
        else:
            future.set_result(job and {"id": job[0].id, "status": "done"})
        return future

    def ready(self) -> Future[Any]:
        return self._answer(None)

    def submit(self, job: Job) -> Future[CaseResult]:
        self.seen.append(job)
        return self._answer(job)

    def close(self) -> None:
        self.closed = True


def executor(workers: list[Fake], **how: Any) -> Executor:
    def start() -> Fake:
        workers.append(Fake(**how))
        return workers[-1]

    return Executor(2, start, (EOFError,))


def test_workers_stay_with_their_model(prepared: Change) -> None:
    workers: list[Fake] = []
    jobs = prepared().jobs
    found = list(run_on(executor(workers), jobs))
    assert sorted(r["id"] for r in found) == sorted(case.id for case, _ in jobs)
    changes = [
        sum(a[0].model != b[0].model for a, b in zip(w.seen, w.seen[1:], strict=False))
        for w in workers
    ]
    assert len(workers) == 2 and max(changes) <= 1
    assert all(worker.closed for worker in workers)


def test_a_case_that_kills_its_workers_fails_and_no_other(prepared: Change) -> None:
    workers: list[Fake] = []
    jobs = prepared(*SMALL).jobs
    bad = jobs[1][0]
    found = list(
        run_on(executor(workers, dies=lambda job: job is not None and job[0] is bad), jobs)
    )
    failed = [r for r in found if r["status"] == "failed"]
    assert [r["id"] for r in failed] == [bad.id]
    assert failed[0]["error"].startswith(f"its worker died {TRIES} times")
    assert len(found) == len(jobs)
    assert sum(case is bad for w in workers for case, _ in w.seen) == TRIES


def test_workers_that_never_start(prepared: Change) -> None:
    workers: list[Fake] = []
    with pytest.raises(NeuroalError, match="the workers do not start: gone"):
        list(run_on(executor(workers, dies=lambda job: job is None), prepared().jobs))
    assert len(workers) == 2 * TRIES + 1  # the last one is not waited for
    assert all(worker.closed for worker in workers)


def test_a_node_takes_several_workers_with_it(prepared: Change) -> None:
    """And whatever is started on it before it is missed."""
    workers: list[Fake] = []

    def start() -> Fake:
        number = len(workers)
        dies = lambda job: (job is not None) if number < 4 else number < 8  # noqa: E731
        workers.append(Fake(dies))
        return workers[-1]

    jobs = prepared().jobs
    found = list(run_on(Executor(4, start, (EOFError,)), jobs))
    assert sorted(r["id"] for r in found) == sorted(case.id for case, _ in jobs)
    assert {r["status"] for r in found} == {"done"}
    assert len(workers) == 12 and all(worker.closed for worker in workers)


def test_no_worker_can_start_any_more(prepared: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster whose last node is gone: a new worker would wait for ever."""

    class Waits(Fake):
        def ready(self) -> Future[Any]:
            return Future()

    def check() -> None:
        raise NeuroalError("no node is left")

    workers: list[Fake] = []

    def start() -> Fake:
        workers.append(Waits())
        return workers[-1]

    monkeypatch.setattr(executors, "PATIENCE", 0.01)
    with pytest.raises(NeuroalError, match="no node is left"):
        list(run_on(Executor(2, start, (EOFError,), check), prepared().jobs))
    assert [worker.closed for worker in workers] == [True, True]


def test_what_an_executor_raises_besides_ends_the_run(prepared: Change) -> None:
    class Broken(Fake):
        def submit(self, job: Job) -> Future[CaseResult]:
            future: Future[CaseResult] = Future()
            future.set_exception(RuntimeError("no result can be sent"))
            return future

    with pytest.raises(RuntimeError, match="no result can be sent"):
        list(run_on(Executor(1, Broken, (EOFError,)), prepared().jobs))


def lives(pid: int) -> bool:
    """A process that has ended and that nobody has asked about yet lives no more."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux who is there")
def test_processes_end_with_their_parent(
    prepared: Change,
    desk: Path,
    start_process: Callable[..., subprocess.Popen[str]],
    until: Callable[..., None],
) -> None:
    """Whatever it died of: nothing goes on in the background."""
    sleeps = f"Path({str(desk)!r}, str(os.getpid())).touch(); import time; time.sleep({2 * HANGS})"
    (desk / "mine.py").write_text(
        KILLS.format(folder=str(desk), times=0).replace("return", f"{sleeps}\n        return")
    )
    prepared(*SMALL, ('"magnitude", "wanda"', '"mine.py:Mine"'))
    command = [sys.executable, "-m", "neuroal", "study", "run", "study.toml", "--jobs", "2", "-q"]
    process = start_process([*command, "--out", "out", "--allow-plugin-files"])

    def workers() -> list[int]:
        return [int(path.name) for path in desk.iterdir() if path.name.isdigit()]

    until(lambda: len(workers()) == 2, process)
    assert all(lives(pid) for pid in workers())
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    until(lambda: not any(lives(pid) for pid in workers()))

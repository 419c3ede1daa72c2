"""A real Ray cluster on this machine: cases run on its nodes, and nodes are killed under them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neuroal.errors import NeuroalError
from neuroal.study.cluster import _room, on_ray
from neuroal.study.results import CaseResult
from neuroal.study.run import PreparedStudy

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'neuroal[ray]'")

Change = Callable[..., PreparedStudy]
Finish = Callable[..., list[CaseResult]]
Start = Callable[..., subprocess.Popen[str]]
HANGS = 1800  # seconds: for what can only hang
STORE = 80 * 2**20
SMALL = (
    ('models = ["llama", "opt"]', 'models = ["opt"]'),
    ("[0.5, 0.7]", "[0.5]"),
    ('"magnitude"', '"mine.py:Mine"'),
)
# The first `stay` workers to score a weight say where they run, and stay there.
STAYS = """
import os, time
from dataclasses import dataclass
from pathlib import Path
import ray
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight):
        for number in range({stay}):
            try:
                with Path({folder!r}, f"stays-{{number}}").open("x") as file:
                    file.write(ray.get_runtime_context().get_node_id())
            except FileExistsError:
                continue
            time.sleep(3600)
        return weight.abs()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing itself, and is quick to miss a node."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 else: they would wait for whatever else runs
        made = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
                "include_log_monitor": False,
                "_system_config": {"health_check_period_ms": 1000},
            },
        )
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def add_nodes(cluster: Any) -> Iterator[Callable[[int], None]]:
    """Adds nodes that hold one (pretended) GPU each and end with the test."""

    def add(nodes: int) -> None:
        for _ in range(nodes):
            cluster.add_node(num_cpus=0, num_gpus=1, object_store_memory=STORE)

    yield add
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def start(cluster: Any, desk: Path, start_process: Start) -> Start:
    """Starts a command on the cluster, whose nodes run in another folder than it does."""
    assert Path.cwd() == desk

    def make(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "neuroal", "study", "run", "study.toml", "--out", "out"]
        return start_process(
            [*command, "--executor", "ray", "-q", "--allow-plugin-files", *options],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
        )

    return make


def kill_node(
    cluster: Any, files: list[Path], process: subprocess.Popen[str], until: Callable[..., None]
) -> None:
    """Kills the node of the workers that stay, once all of them do."""
    until(lambda: all(file.exists() and file.read_text() for file in files), process)
    (name,) = {file.read_text() for file in files}
    (node,) = (node for node in cluster.worker_nodes if node.node_id == name)
    cluster.remove_node(node, allow_graceful=False)


def finished(desk: Path) -> list[CaseResult]:
    return [json.loads(path.read_text()) for path in sorted((desk / "out/cases").iterdir())]


def values(results: list[CaseResult]) -> dict[str, dict[str, Any]]:
    return {r["id"]: {n: s["value"] for n, s in r["scores"].items()} for r in results}


@pytest.mark.ray
def test_nothing_is_lost_with_a_node(
    prepared: Change,
    finish: Finish,
    desk: Path,
    cluster: Any,
    start: Start,
    add_nodes: Any,
    until: Callable[..., None],
) -> None:
    """One of two nodes is killed in the middle of a case, which the other one runs again."""
    (desk / "mine.py").write_text(STAYS.format(folder=str(desk), stay=1))
    prepared(*SMALL)
    add_nodes(2)

    refused = start("--gpus-per-case", "2")
    _, said = refused.communicate(timeout=HANGS)
    assert "no node of the Ray cluster has room for a case, which takes 2 GPU\n" in said
    assert refused.returncode == 2  # at once, though the two nodes have two together

    run = start("--gpus-per-case", "1")
    kill_node(cluster, [desk / "stays-0"], run, until)
    _, said = run.communicate(timeout=HANGS)
    assert run.returncode == 0, said
    found = finished(desk)
    assert [r["status"] for r in found] == ["done"] * 5
    assert prepared().jobs == ()
    for path in (desk / "out/cases").iterdir():
        path.unlink()
    assert values(found) == values(finish(prepared()))  # in this process


@pytest.mark.ray
def test_the_last_node_is_lost(
    prepared: Change,
    desk: Path,
    cluster: Any,
    start: Start,
    add_nodes: Any,
    until: Callable[..., None],
) -> None:
    """Two cases share the GPU of the only node when that is killed."""
    (desk / "mine.py").write_text(STAYS.format(folder=str(desk), stay=2))
    prepared(*SMALL)
    add_nodes(1)
    run = start("--gpus-per-case", "0.5")
    kill_node(cluster, [desk / "stays-0", desk / "stays-1"], run, until)
    _, said = run.communicate(timeout=HANGS)
    assert "Error: the Ray cluster has lost every node with room for a case" in said
    assert run.returncode == 1
    assert len(finished(desk)) + len(prepared().jobs) == 5


def test_a_ray_started_here_does_not_report_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**how: Any) -> None:
        raise RuntimeError(f"usage statistics: {os.environ['RAY_USAGE_STATS_ENABLED']}")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # so that it is as before in the end
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="usage statistics: 0"), on_ray(Any, None, 0.0):
        pass


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**how: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.7:6379")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(NeuroalError) as error, on_ray(Any, None, 0.0):
        pass
    assert str(error.value) == (
        "no Ray cluster answers: Failed to connect to Ray cluster at 192.0.2.7:6379: "
        "start it, or set RAY_ADDRESS to one that runs"
    )


@pytest.mark.parametrize(
    ("gpus_per_case", "nodes", "room"),
    [
        (0.0, [{"CPU": 4.0}, {"CPU": 1.5, "GPU": 8.0}, {}], 5),
        (1.0, [{"CPU": 4.0}, {"GPU": 2.0}, {"GPU": 1.0}], 3),
        (2.0, [{"GPU": 1.0}, {"GPU": 1.0}], 0),  # together they are enough, and neither is
        (2.0, [{"GPU": 5.0}, {"GPU": 1.0}], 2),
        (0.5, [{"GPU": 1.0}, {"GPU": 1.0}], 4),
        (0.6, [{"GPU": 2.0}], 2),  # no fraction is of two GPUs
        (0.1, [{"GPU": 1.0}], 10),
    ],
)
def test_room(gpus_per_case: float, nodes: list[dict[str, float]], room: int) -> None:
    told = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    assert _room(SimpleNamespace(nodes=lambda: [*told, dead]), gpus_per_case) == room

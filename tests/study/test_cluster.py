"""A Ray cluster of two nodes, one of which is killed in the middle of a case."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuroal.errors import UsageError
from neuroal.study.results import Result
from neuroal.study.run import Prepared

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'neuroal[ray]'")

Change = Callable[..., Prepared]
Finish = Callable[..., list[Result]]
# The first case to get here says where it runs, and waits until that node is killed.
WAITS = """
import time
from dataclasses import dataclass
from pathlib import Path
import ray
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    @hookimpl
    def score_weights(self, weight):
        marker = Path({folder!r}, "node")
        if ray.is_initialized() and not marker.exists():
            marker.write_text(ray.get_runtime_context().get_node_id())
            time.sleep(600)
        return weight.abs()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs nothing, and two nodes of one CPU and one (pretended) GPU each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    store = 80 * 2**20
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store}
    )
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=1, object_store_memory=store)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(
    "NEUROAL_TEST_RAY" not in os.environ, reason="takes minutes on two cores: NEUROAL_TEST_RAY=1"
)
def test_nothing_is_lost_with_a_node(
    prepared: Change, finish: Finish, desk: Path, cluster: Any
) -> None:
    (desk / "mine.py").write_text(WAITS.format(folder=str(desk)))
    what = prepared(
        ('models = ["llama", "opt"]', 'models = ["opt"]'), ('"magnitude"', '"mine.py:Mine"')
    )
    killed: list[str] = []

    def kill() -> None:
        marker = desk / "node"
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.05)
        node = next(n for n in cluster.worker_nodes if n._node_id == marker.read_text())
        cluster.remove_node(node, allow_graceful=False)
        killed.append(node._node_id)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = finish(what, executor="ray", gpus_per_case=1.0)
    thread.join(60)
    assert killed == [(desk / "node").read_text()]
    assert [r["status"] for r in found] == ["done"] * 9
    assert prepared().jobs == ()
    for path in (desk / "out/cases").iterdir():
        path.unlink()
    here = finish(prepared())

    def values(results: list[Result]) -> dict[str, dict[str, Any]]:
        return {r["id"]: {n: s["value"] for n, s in r["scores"].items()} for r in results}

    assert values(found) == values(here)

    with pytest.raises(UsageError, match="no room for a case, which takes 2 GPU"):
        (desk / "out/study.json").unlink()
        for path in (desk / "out/cases").iterdir():
            path.unlink()
        (desk / "out/cases").rmdir()
        finish(prepared(), executor="ray", gpus_per_case=2.0)

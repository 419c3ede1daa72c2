"""Output folders: which names there can be, and that one process alone writes to one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neuroal
from neuroal import Recipe, UsageError
from neuroal.model.output import one_writer, output_folder

Start = Callable[..., subprocess.Popen[str]]

HOLDS = """
import sys
from pathlib import Path
from neuroal.model.output import one_writer
with one_writer(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(start_process: Start, tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts a process that writes to a folder until its input ends."""

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, name]
        process = start_process(command, cwd=tmp_path, stdin=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        return process

    return start


def test_the_second_writer_is_refused_and_told_who_writes(holder: Any, tmp_path: Path) -> None:
    first = holder("a/out")
    for name in ("a/out", "a/../a/out"):
        refused = pytest.raises(UsageError, match=f"written by process {first.pid} on")
        with refused, one_writer(tmp_path / name):
            pass
    with one_writer(tmp_path / "a/other"):
        pass
    first.communicate("")
    with one_writer(tmp_path / "a/out"):
        pass
    assert list(tmp_path.iterdir()) == [], "what was made for the lock is removed with it"


def test_a_killed_writer_keeps_nobody_out(holder: Any, tmp_path: Path) -> None:
    first = holder("out")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / "out.lock").exists()
    with one_writer(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_many_at_once(start_process: Start, tmp_path: Path) -> None:
    """Of processes that come and go, never two are in there together."""
    program = """
import os, sys
from pathlib import Path
from neuroal import UsageError
from neuroal.model.output import one_writer
done = 0
while done < 20:
    try:
        with one_writer(Path("out")):
            os.close(os.open("inside", os.O_CREAT | os.O_EXCL))
            os.unlink("inside")
            done += 1
    except UsageError:
        pass
"""
    processes = [start_process([sys.executable, "-c", program], cwd=tmp_path) for _ in range(3)]
    for process in processes:
        assert process.wait() == 0, process.communicate()[1]
    assert list(tmp_path.iterdir()) == []


def test_prune_apply_and_the_journal_are_refused(
    holder: Any, models: Any, recipe: Recipe, tmp_path: Path
) -> None:
    quick = {"pruner": "magnitude", "top_up": "uniform", "sparsity": 0.5}
    neuroal.prune(models["phi"], out=tmp_path / "run", **quick)
    holder("out")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="is being written by process"):
            neuroal.prune(models["phi"], out=tmp_path / "out", **quick, **how)
    with pytest.raises(UsageError, match="is being written by process"):
        neuroal.apply(str(models["phi"]), tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\0b", "NUL"),
        ("a\ud800b", "no text that a path can hold"),
        ("x" * 300, "of 300 bytes: give one of at most"),
        ("é" * 130, "of 260 bytes"),
        ("/".join(["d" * 100] * 60), "too long"),
        ("~nobody-of-this-name/x", "home"),
        (".", "no name of its own"),
    ],
)
def test_names_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        output_folder(name)
    assert len(str(error.value)) < 200 and str(error.value).isprintable()


def test_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("~/out") == tmp_path / "out"


def test_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("link", "dangling", "loop"):
        with pytest.raises(UsageError, match="is a link to"):
            output_folder(tmp_path / name)
    with pytest.raises(UsageError, match="no folder to write in"):
        output_folder(tmp_path / "dangling/out")
    assert output_folder(tmp_path / "link/out").parent == tmp_path / "link"
    assert output_folder(tmp_path / "link", in_place=True) == tmp_path / "link"
    with pytest.raises(UsageError, match="is a link to"):
        output_folder(tmp_path / "dangling", in_place=True)

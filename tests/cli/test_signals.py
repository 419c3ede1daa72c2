"""Signals end a command in one line, with the exit code of the signal, whenever they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Sends itself a signal when a module is first looked for: `... MODULE SIGNAL ARGUMENT...`.
AT_IMPORT = """
import os, runpy, sys
_, module, number, *arguments = sys.argv
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Finder())
sys.argv = ["neuroal", *arguments]
runpy.run_module("neuroal", run_name="__main__", alter_sys=True)
"""
STAYS = """
import time
from dataclasses import dataclass
from pathlib import Path
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    '''Stays in the second block.'''

    @hookimpl
    def score_weights(self, weight, linear):
        if "layers.1." in linear.name:
            Path("stays").touch()
            time.sleep(3600)
        return weight.abs()
"""
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("module", ["click", "neuroal.cli.study", "torch"])
def test_while_modules_are_imported(
    module: str, number: signal.Signals, folder: Path, run_process: Any
) -> None:
    command = [sys.executable, "-c", AT_IMPORT, module, str(int(number))]
    done = run_process([*command, "prune", "tiny", "--calibration", "rows.jsonl"], cwd=folder)
    assert (done.returncode, done.stderr) == (SIGNALS[number], "Error: interrupted\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_while_a_run_goes_on(
    number: signal.Signals,
    folder: Path,
    start_process: Callable[..., subprocess.Popen[str]],
    until: Callable[..., None],
) -> None:
    (folder / "mine.py").write_text(STAYS)
    how = ["--pruner", "./mine.py:Mine", "--top-up", "uniform", "--out", "out", "-q"]
    process = start_process(
        [sys.executable, "-m", "neuroal", "prune", "tiny", *how],
        cwd=folder,
        # A run of the tests in the background ignores SIGINT, and hands that on.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    until((folder / "stays").exists, process)
    os.kill(process.pid, number)
    printed, said = process.communicate()
    assert printed == ""
    assert said == "Error: interrupted; --resume goes on from 'out.partial'\n"
    assert process.returncode == SIGNALS[number]
    assert not (folder / "out.lock").exists()


def test_what_is_ignored_stays_ignored(folder: Path, run_process: Any) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + AT_IMPORT
    done = run_process([sys.executable, "-c", code, "click", "2", "plugins", "list"], cwd=folder)
    assert done.returncode == 0 and "wanda" in done.stdout

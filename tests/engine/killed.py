"""Runs one recipe again and again, killed a step later each time, and resumes what is left.

    python killed.py FOLDER < case.json > results.json

A step is a change on disk: between two changes, what a kill leaves is the same. Every run is a
forked child, killed by SIGKILL before its n-th step, which Python's audit events count: opening a
file for writing, making, renaming or removing something. This is a script, not a test module: a
process of its own has no threads that a fork would lose.

case.json: `model`, `recipe`, `reference` (the folder of an uninterrupted run), `every` (take
every n-th step), and, to start over an earlier run, `earlier` (its folder) and `resume` (keywords
of the call that goes on).
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuroal import Recipe, engine

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def kill_at(n: int) -> None:
    """Kill this process before its n-th change on disk, and say in a file which it would be."""
    seen = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or event in CHANGES:
            seen += 1
            if seen == n:
                os.write(1, f"{event} {Path(str(args[0])).name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def child(work: Callable[[], Any]) -> tuple[int, str]:
    """Do the work in a forked child; its exit status (negative: a signal) and what it wrote."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(write, 1)
            work()
            status = 0
        except BaseException:
            os.write(1, traceback.format_exc(limit=-3).encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text.strip()


def identity(folder: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file, and the candidates of the report."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    report = json.loads((folder / "neuroal.json").read_text())
    return found | {key: json.dumps(report[key]) for key in ("candidates", "sparsity", "linears")}


def main() -> None:
    folder, case = Path(sys.argv[1]), json.load(sys.stdin)
    recipe, reference = Recipe.from_json(case["recipe"]), identity(Path(case["reference"]))
    earlier, resume = case.get("earlier"), case.get("resume", {"resume": True})
    out = folder / "out"

    def run(**how: Any) -> None:
        engine.prune(case["model"], recipe=recipe, out=out, **how)

    def killed(n: int) -> None:
        kill_at(n)
        run(overwrite=earlier is not None)

    run()  # here and not in a child: what is imported late is there for every child from here on
    results, n = [], 1
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        if earlier is not None:
            shutil.copytree(earlier, out)
        status, step = child(lambda n=n: killed(n))
        result: dict[str, Any] = {"n": n, "step": step, "status": status}
        if status == -signal.SIGKILL:
            result["left"] = sorted(p.name for p in folder.iterdir())
            status, text = child(lambda: run(**resume))
            result |= {"resumed": status, "text": text}
        result["kept"] = sorted(p.name for p in folder.iterdir())
        result["same"] = (out / "neuroal.json").is_file() and identity(out) == reference
        results.append(result)
        if result["status"] != -signal.SIGKILL:
            break
        n += case["every"]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

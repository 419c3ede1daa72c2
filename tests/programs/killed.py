"""Runs recipes, ends them by SIGKILL or looks at what a kill would leave, and resumes.

    python killed.py FOLDER < cases.json > results.json

A step is a change on disk as Python's audit events tell it: opening a file for writing, making,
renaming or removing something. Between two steps a kill leaves the same, so the folder is copied
before each, and a run resumed from each copy. Real kills, of forked children, show that the copies
tell the truth. A script and no test module: its process has no threads that a fork would lose.

cases.json: by name `model` (a folder, or the structure of a tiny model in memory), `recipe`,
`reference` (the folder of an uninterrupted run), and optionally `windows`, `earlier` (a finished
run that is replaced), `since` (the step to begin with), `kills` (steps to be killed before),
`every` (of the steps, look at every n-th alone),
`again` (kill the run and all that resume it, each so many steps later, until one ends by itself),
`stream` and `bookmarks` (keep how far a walk has come after every piece of it).
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from neuroal import Recipe, engine
from neuroal.model import pretrained
from neuroal.testing import STRUCTURES, tiny_model
from neuroal.walk import bookmark

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
HALF = "half of the weights saved"
Result = dict[str, Any]


def child(work: Callable[[], Any]) -> tuple[int, list[str]]:
    """Do the work in a forked child; its status (negative: a signal) and the lines it wrote."""
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
        lines = stream.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines


def watch(at_step: Callable[[int, str], None]) -> None:
    """Call back before every step of this process, which ends with it."""
    seen, busy = 0, False

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, busy
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (writes or event in CHANGES) and not busy:
            busy = True  # what the callback does is no step
            at_step(seen, f"{event} {Path(str(args[0])).name}")
            seen, busy = seen + 1, False

    sys.addaudithook(audit)


def die() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def killer(step: int) -> Callable[[int, str], None]:
    """Return what kills the process that is watched before a step."""

    def at_step(n: int, _: str) -> None:
        if n == step:
            die()

    return at_step


def identity(folder: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file, and what the report says of the result."""
    files = folder.glob("*.safetensors")
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    report = json.loads((folder / "neuroal.json").read_text())
    return found | {key: json.dumps(report[key]) for key in ("candidates", "sparsity", "linears")}


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder by path."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else b"" for name, p in paths.items()}


class Case:
    """What is run, and how the result is judged."""

    def __init__(self, folder: Path, case: dict[str, Any]) -> None:
        self.folder, self.out, self.copies = folder / "runs", folder / "runs/out", folder / "copies"
        self.model = case["model"]
        self.recipe = Recipe.from_json(case["recipe"])
        self.reference = identity(Path(case["reference"]))
        self.windows = torch.tensor(case["windows"]) if "windows" in case else None
        self.earlier = case.get("earlier")
        self.stream = case.get("stream")

    def fresh(self) -> None:
        """Make the folder as it was before any run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.earlier is not None:
            shutil.copytree(self.earlier, self.out)

    def run(self, **how: Any) -> None:
        in_memory = self.model in STRUCTURES
        model = tiny_model(self.model) if in_memory else self.model
        if self.windows is not None:
            how["windows"] = self.windows
        engine.prune(model, recipe=self.recipe, out=self.out, stream=self.stream, **how)
        if in_memory:
            saved, held = load_file(self.out / "model.safetensors"), model.state_dict()
            assert all(torch.equal(held[name], tensor) for name, tensor in saved.items())

    def begin(self, at_step: Callable[[int, str], None]) -> tuple[int, list[str]]:
        """Start the run in a child that is watched."""

        def work() -> None:
            watch(at_step)
            self.run(overwrite=self.earlier is not None)

        self.fresh()
        return child(work)

    def resumed(self, step: str, status: int) -> Result:
        """Resume what is left; say what came of it."""
        ended, said = child(lambda: self.run(resume=True))
        return {"step": step, "status": status, "resumed": ended, "said": said} | self.judged()

    def judged(self) -> Result:
        whole = (self.out / "neuroal.json").is_file()
        return {
            "holds": sorted(p.name for p in self.folder.iterdir()),
            "same": whole and identity(self.out) == self.reference,
        }


def sweep(case: Case, since: str, kills: list[str], every: int) -> Iterator[Result]:
    """Resume from what is on disk before every step, and from what real kills leave."""
    shutil.rmtree(case.copies, ignore_errors=True)

    def copy(n: int, step: str) -> None:
        os.write(1, f"{step}\n".encode())
        shutil.copytree(case.folder, case.copies / str(n))

    status, steps = case.begin(copy)
    yield {"step": "none", "status": status, "resumed": 0, "said": steps} | case.judged()
    first = next(n for n, step in enumerate(steps) if since in step)
    seen: list[dict[str, bytes]] = []
    removed = 0
    for n in range(first, len(steps), every):
        step = steps[n]
        removed = removed + 1 if step.startswith("os.remove") else 0
        left = content(case.copies / str(n))
        # Enough of the files of a folder that goes; and what changed nothing needs no second look.
        if removed % 4 < 2 and left not in seen:
            seen.append(left)
            shutil.rmtree(case.folder)
            shutil.copytree(case.copies / str(n), case.folder)
            yield case.resumed(step, -signal.SIGKILL)
    for part in kills:
        n = next(n for n, step in enumerate(steps) if part in step)
        status, _ = case.begin(killer(n))
        assert content(case.folder).keys() == content(case.copies / str(n)).keys()
        yield case.resumed(f"killed before {steps[n]}", status)
    if kills:
        status, _ = case.begin(half_of_the_weights())
        yield case.resumed(HALF, status)
        yield from half_files(case, every)


def half_files(case: Case, every: int) -> Iterator[Result]:
    """Kill a run when it has written the first half of its n-th file, for every n or some."""
    write = Path.write_bytes

    def work(last: int) -> None:
        written: list[Path] = []

        def half(path: Path, data: bytes) -> int:
            written.append(path)
            if len(written) < last:
                return write(path, data)
            write(path, data[: len(data) // 2])
            os.write(1, f"half of {path.name}\n".encode())
            return die()

        Path.write_bytes = half  # type: ignore[assignment,method-assign]
        case.run()

    for n in range(1, 100, every):
        case.fresh()
        status, said = child(partial(work, n))
        if status == 0:
            return
        yield case.resumed(said[0], status)


def half_of_the_weights() -> Callable[[int, str], None]:
    """Return what kills a run when it has written the first half of the weights."""
    save = pretrained.save

    def half(model: Any, tokenizer: Any, folder: Path, *state: Any) -> None:
        save(model, tokenizer, folder, *state)
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        die()

    def at_step(n: int, _: str) -> None:
        pretrained.save = half

    return at_step


def again_and_again(case: Case, every: int) -> Iterator[Result]:
    """Kill the run, and every run that resumes it, each so many steps later than the one before."""

    def work(last: int) -> None:
        watch(killer(last))
        case.run(resume=True)

    case.fresh()
    for last in range(every, 20 * every, every):
        status, said = child(partial(work, last))
        yield {"step": f"killed at {last}", "status": status, "said": said} | case.judged()
        if status != -signal.SIGKILL:
            return


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    usual = bookmark.SECONDS, bookmark.SHARE
    for name, given in json.load(sys.stdin).items():
        case = Case(folder, given)
        bookmark.SECONDS, bookmark.SHARE = (0.0, 0) if "bookmarks" in given else usual
        case.fresh()
        case.run(overwrite=case.earlier is not None)  # what is imported late is there for children
        if "again" in given:
            results[name] = list(again_and_again(case, given["again"]))
        else:
            how = given.get("since", ""), given.get("kills", []), given.get("every", 1)
            results[name] = list(sweep(case, *how))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

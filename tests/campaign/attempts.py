"""One attempt: the program in a forked child, and what is wrong with how it ended."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

HANGS = 120.0  # seconds
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        status: Of the process; negative: the signal that ended it.
        said: What it wrote to stdout and stderr.
        hung: It was ended because it did not end.
    """

    status: int
    said: str
    hung: bool = False

    @property
    def wrong(self) -> str:
        """What no attempt may do; empty where it did nothing of it."""
        if self.hung:
            return "hangs"
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.status < 0 and self.status != -signal.SIGKILL:
            return f"ended by signal {-self.status}"
        if "-v for the traceback" in self.said:
            return "unnamed error"
        if self.status > 0 and not re.search(r"^(Error|error): .", self.said, re.MULTILINE):
            return "no error line"
        return ""

    @property
    def last(self) -> str:
        """Its last line."""
        return (self.said.strip().splitlines() or [""])[-1][:300]


@dataclass
class Row:
    """A row of the campaign's table."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, failure: str = "") -> None:
        self.tried += 1
        self.outcomes["failed" if failure else outcome] += 1
        if failure:
            self.failures.append(failure)
            print(f"FAILED {failure}", file=sys.stderr, flush=True)


def start(words: Sequence[object], before: Callable[[], None] = int) -> tuple[int, Path]:
    """Start the program with arguments in a child that does something `before`; its number, log."""
    handle, name = tempfile.mkstemp(prefix="said-")
    pid = os.fork()
    if pid:
        os.close(handle)
        return pid, Path(name)
    status = 1
    try:
        gc.freeze()  # else its collector would copy all that it shares
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from neuroal.cli import main

        before()
        main([str(w) for w in words], prog_name="neuroal")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def end(child: tuple[int, Path], patience: float = HANGS) -> Ended:
    """Wait for a child that was started; end it where it hangs."""
    pid, log = child
    limit, hung, status = time.monotonic() + patience, False, None
    while status is None:
        found, raw = os.waitpid(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(raw)
        elif not hung and time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
            hung = True
        else:
            time.sleep(0.005)
    said = log.read_text(errors="replace")
    log.unlink()
    return Ended(status, said, hung)


def attempt(words: Sequence[object], before: Callable[[], None] = int) -> Ended:
    """Run the program with arguments, to its end."""
    return end(start(words, before))


def at_steps(do: Callable[[int, str], None]) -> Callable[[], None]:
    """Return what calls back before every change on disk that Python tells of."""

    def watch() -> None:
        seen, busy = 0, False

        def audit(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen, busy
            writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if (writes or event in CHANGES) and not busy:
                busy = True  # what is done then is no step
                try:
                    do(seen, f"{event} {Path(str(args[0])).name}")
                finally:
                    seen, busy = seen + 1, False

        sys.addaudithook(audit)

    return watch


def until(seconds: float) -> Iterator[int]:
    """Count while there is time, from the call on."""
    stop = time.monotonic() + seconds
    return takewhile(lambda _: time.monotonic() < stop, count())

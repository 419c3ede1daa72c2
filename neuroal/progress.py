"""Progress on stderr: a bar where a terminal shows one, else a line every 30 seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from neuroal.units import rough_duration

SECONDS = 30.0  # from line to line

if TYPE_CHECKING:
    _Tqdm = tqdm[Any]
else:  # generic for types alone
    _Tqdm = tqdm


def on_terminal() -> bool:
    """Return whether stderr is a terminal that says how wide it is."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no file, or one that is closed
        return False


def bar(*, early: bool = False, **options: Any) -> tqdm[Any]:
    """Return a bar, or what writes lines in its place; the options are tqdm's.

    Args:
        early: The first line comes after 5 seconds, of what nothing was said about before.
        **options: Of tqdm.
    """
    return tqdm(**options) if on_terminal() else _Lines(early=early, **options)


class _Lines(_Tqdm):
    """Says in a line of its own how far it is, every 30 seconds, also within a long step."""

    def __init__(self, early: bool = False, **options: Any) -> None:
        self._said = time.monotonic()
        self._wait = SECONDS / 6 if early else SECONDS
        self._ended, self._lines = threading.Event(), threading.Lock()
        # tqdm asks for a display after every step; `display` says how often that is answered.
        super().__init__(**options | {"mininterval": 0, "miniters": 1, "leave": False})
        if not self.disable:
            threading.Thread(target=self._go_on, name="progress", daemon=True).start()

    def _go_on(self) -> None:
        while not self._ended.wait(max(self._wait, 0.01)):
            self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if it is time."""
        now = time.monotonic()
        with self._lines:
            if msg != "" and not self._ended.is_set() and now - self._said >= self._wait:
                self._said, self._wait = now, SECONDS
                self.fp.write(f"{self._line()}\n")
                self.fp.flush()

    def _line(self) -> str:
        known = self.format_dict
        done, total, elapsed = known["n"], known["total"], known["elapsed"]
        new = done - known["initial"]
        words = [f"{done} of {total}" if total else str(done), f"{rough_duration(elapsed)} so far"]
        if total and new > 0:
            words.append(f"about {rough_duration(elapsed / new * (total - done))} left")
        title = str(known["prefix"]).removesuffix(": ")
        return f"{title}: {', '.join(words)}"

    def close(self) -> None:
        """End without a word."""
        self._ended.set()
        if not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]

"""The command `neuroal`, as `python -m neuroal` too: a signal ends it in one line at any time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_received = signal.SIGINT


def _end(number: int, _frame: object) -> None:
    """End at once; for when nothing has begun, or all is done."""
    os.write(2, b"Error: interrupted\n")
    os._exit(128 + number)


def _interrupt(number: int, _frame: object) -> None:
    """Raise what Ctrl-C does, so that a command tidies up and says how to go on."""
    global _received
    _received = signal.Signals(number)
    raise KeyboardInterrupt


def _on_signals(handler: Callable[[int, object], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of what runs in the background
            signal.signal(number, handler)


def run() -> NoReturn:
    """Run the command; the exit code of one that SIGINT ends is 130, of SIGTERM 143."""
    _on_signals(_end)
    from neuroal.cli import main

    status: object = 128 + signal.SIGINT
    try:
        _on_signals(_interrupt)
        main(prog_name="neuroal")
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        os.write(2, b"Error: interrupted\n")
    finally:
        _on_signals(_end)
    sys.exit(128 + _received if status == 128 + signal.SIGINT else status)  # type: ignore[arg-type]


if __name__ == "__main__":
    run()

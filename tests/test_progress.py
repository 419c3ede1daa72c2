"""Bars on a terminal, and a line every thirty seconds where there is none or it has no width."""

import io
import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from tqdm import tqdm

from neuroal import progress
from neuroal.progress import bar


class Stderr(io.StringIO):
    """A stderr that says of itself what a test wants."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def fileno(self) -> int:
        return 2


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stderr]:
    def make(terminal: bool = False, columns: int = 80) -> Stderr:
        made = Stderr(terminal)
        monkeypatch.setattr("sys.stderr", made)
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(os, "get_terminal_size", lambda _: size)
        return made

    return make


def test_a_bar_where_a_terminal_has_a_width(stderr: Callable[..., Stderr]) -> None:
    said = stderr(terminal=True)
    with bar(total=2, desc="walk", leave=False) as shown:
        shown.update()
    assert type(shown) is tqdm and "walk" in said.getvalue() and "\r" in said.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_in_a_log_and_on_a_terminal_of_width_0(
    terminal: bool, stderr: Callable[..., Stderr], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own: 12 steps of 10 seconds are 4 lines."""
    said, now = stderr(terminal, columns=0), 0.0
    monkeypatch.setattr(progress, "SECONDS", 30.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with bar(total=12, desc="prune", leave=False) as shown:
        for _ in range(12):
            now += 10.0
            shown.update()
    lines = said.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"prune: {n} of 12" for n in (3, 6, 9, 12)]
    assert "\r" not in said.getvalue()
    for line in lines:
        assert re.fullmatch(r"prune: \d+ of 12, \S+ s so far, about \S+ s left", line), line


def test_a_line_comes_within_a_long_step_too(
    stderr: Callable[..., Stderr], monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    said = stderr()
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    with bar(total=5, desc="walk", initial=2) as shown:
        until(lambda: said.getvalue().count("walk: 2 of 5") >= 2)
        assert shown.n == 2
    ended = said.getvalue()
    time.sleep(0.1)
    assert said.getvalue() == ended


def test_the_first_line_may_come_early(
    stderr: Callable[..., Stderr], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own: steps of 2 seconds, so after 6, and 30 seconds later."""
    said, now = stderr(), 0.0
    monkeypatch.setattr(progress, "SECONDS", 30.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with bar(early=True, total=20, desc="perplexity") as shown:
        for _ in range(20):
            now += 2.0
            shown.update()
    lines = said.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"perplexity: {n} of 20" for n in (3, 18)]


@pytest.mark.parametrize("options", [{"disable": True}, {}])
def test_nothing_is_said_of_what_is_quick_or_unwanted(
    options: dict[str, Any], stderr: Callable[..., Stderr]
) -> None:
    said = stderr()
    for _ in bar(iterable=range(3), desc="walk", **options):
        pass
    assert said.getvalue() == ""

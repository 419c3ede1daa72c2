"""What looks like an option and is none is said; plugins of files are checked where they lie."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from neuroal import UsageError
from neuroal.cli import main
from neuroal.options import untyped
from neuroal.plugins import listings, load

PLAIN = """
from dataclasses import dataclass
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    '''|W|^power.'''

    power = 0.5
    LIMIT = 3

    @hookimpl
    def score_weights(self, weight):
        return weight.abs()
"""
BROKEN = PLAIN.replace("weight.abs()", "weight.abs().sum()")
ROWS = """
from dataclasses import dataclass
from neuroal import Generation, Proposal, hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    '''The ratios of the base in every row.'''

    @hookimpl
    def propose_row_ratios(self, base):
        yield Generation([Proposal(dict(base))])
"""


class Parent:
    gamma = (1.0,)
    declared: int = 1


class Child(Parent):
    alpha = 0.5
    depth = None
    _own = 1
    CAPITAL = 2
    known: ClassVar[int] = 3
    declared = 4

    def method(self) -> None: ...

    @property
    def seen(self) -> int:
        return 1


def test_untyped_attributes_are_found_with_what_to_write() -> None:
    assert untyped(Child) == {
        "alpha": "it has no type: write alpha: float = 0.5",
        "depth": "it has no type: write depth: int | None = None",
        "gamma": "it has no type: write gamma: tuple[float, ...] = (1.0,)",
    }


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(source)
        return f"{path}:Mine"

    return write


def run(*words: str) -> Any:
    return CliRunner().invoke(main, words, prog_name="neuroal")


def test_a_field_without_a_type_is_said_to_be_no_option(
    file: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    choice = file(PLAIN)
    with caplog.at_level(logging.WARNING):
        load([("pruner", choice)])
        load([("pruner", choice)])
    said = "'power' is no option: it has no type: write power: float = 0.5"
    assert [r.getMessage().endswith(said) for r in caplog.records] == [True]  # once
    with pytest.raises(UsageError, match=r"no option 'power': it has no type: write power: float"):
        load([("pruner", choice)], {"mine": {"power": 1}})
    with pytest.raises(UsageError, match=r"no option 'strength': it has no options"):
        load([("pruner", choice)], {"mine": {"strength": 1}})


def test_plugins_check_takes_a_file(file: Callable[[str], str]) -> None:
    choice = file(PLAIN)
    done = run("plugins", "check", choice)
    assert done.exit_code == 0, done.output
    assert f"pruner 'mine' ({choice.rpartition(':')[0]} file): ok" in done.output
    assert "Warning: " in done.output and "'power' is no option" in done.output
    assert done.output.endswith("1 plugin, 0 broken\n")
    broken = run("plugins", "check", file(BROKEN))
    assert broken.exit_code == 1 and "1 plugin, 1 broken" in broken.output


def test_the_role_of_a_file_is_that_of_its_hooks(file: Callable[[str], str]) -> None:
    choice = file(ROWS)
    assert [x.role for x in listings(choice)] == ["row_ratios"]
    shown = run("plugins", "show", choice)
    assert shown.exit_code == 0 and shown.output.startswith("row_ratios mine (")
    done = run("plugins", "check", choice)
    assert done.exit_code == 0 and done.output.endswith("1 plugin, 0 broken\n")
    other = run("plugins", "check", choice, "--role", "pruner")
    assert other.exit_code == 1 and "belongs to role row_ratios" in other.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("missing.py:Mine",), "there is no file missing.py"),
        (("mine.py",), "names no class: write mine.py:CLASS"),
        (("mine.py:Other",), "there is no mine.py:Other"),
        (("mine.py:NUMBER",), "has the hooks of no role: give --role to see what it lacks"),
    ],
)
def test_what_no_file_has_is_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PLAIN + "\nNUMBER = 1\n")
    done = run("plugins", "check", *words)
    assert done.exit_code in (1, 2)
    assert done.output.startswith("Error: ") and said in done.output

"""Twelve kinds of broken plugin: each one line with its name, source and cure, and no harm done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAD = """\
from dataclasses import dataclass
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    '''Scores by magnitude.'''

    @hookimpl
"""
GOOD = HEAD + "    def score_weights(self, weight):\n        return weight.abs()\n"
Install = Callable[..., Path]


def scores(body: str) -> str:
    return GOOD.replace("return weight.abs()", body)


# Source of the module, what the line says, and how it ends: in the cure.
KINDS = {
    "import error": (
        "from torch import no_such_name\n" + GOOD,
        "does not import: ImportError: cannot import name 'no_such_name'",
        "upgrade or uninstall their-dist",
    ),
    "syntax error": (
        GOOD + "def broken(:\n",
        "does not import: SyntaxError: invalid syntax",
        "upgrade or uninstall their-dist",
    ),
    "missing dependency": (
        "import no_such_pkg\n" + GOOD,
        "does not import: ModuleNotFoundError: No module named 'no_such_pkg'",
        "install no_such_pkg",
    ),
    "class instead of dataclass": (
        GOOD.replace("@dataclass(frozen=True, eq=False)\n", ""),
        "Mine is not a dataclass",
        "decorate it with @dataclass(frozen=True, eq=False)",
    ),
    "unknown hook": (
        GOOD.replace("def score_weights", "def score_weight"),
        "hook score_weight is unknown",
        "did you mean 'score_weights'?",
    ),
    "defaulted argument": (
        GOOD.replace("weight)", "weight, statistics=None)"),
        "hook score_weights gives its argument 'statistics' a default",
        "remove it, or make an option (a field) of the argument",
    ),
    "wrong role": (
        HEAD + "    def refine_mask(self, mask):\n        return mask\n",
        "hook refine_mask belongs to role refiner",
        "declare it there, or remove the hook",
    ),
    "wrong shape": (
        scores("return weight.abs().sum(dim=1)"),
        "hook score_weights: returned shape (32,), not (32, 32), for linear 'model.layers.0.",
        "upgrade their-dist or use another plugin",
    ),
    "NaN": (
        scores("return weight / 0 * 0"),
        "hook score_weights: returned NaN or infinity for linear 'model.layers.0.",
        "upgrade their-dist or use another plugin",
    ),
    "mutation of its input": (
        scores("return weight.abs_()"),
        "hook score_weights: wrote to its input 'weight'",
        "work on a copy (clone())",
    ),
    "exception": (
        scores("return weight.abs() / (1 // 0)"),
        "hook score_weights: ZeroDivisionError: integer division or modulo by zero",
        "upgrade their-dist or use another plugin",
    ),
}
POINTS = {"pruner": {"mine": "stranger:Mine"}}


def error_line(result: Any) -> str:
    """The one line on stderr, and nothing on stdout."""
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return str(result.stderr).removeprefix("Error: ").rstrip()


@pytest.mark.parametrize("kind", KINDS)
def test_broken_plugin_is_one_line(kind: str, install: Install, prune: Any, folder: Path) -> None:
    source, said, cure = KINDS[kind]
    install("their-dist", POINTS, {"stranger": source}, version="1.2")
    before = sorted(folder.rglob("*"))
    result = prune("--pruner", "mine")
    line = error_line(result)
    assert line.startswith("pruner 'mine' (their-dist 1.2)")
    assert said in line
    assert line.endswith(f": {cure}")
    assert result.exit_code == 1
    assert sorted(folder.rglob("*")) == before


def test_clash_is_one_line(install: Install, prune: Any, folder: Path) -> None:
    install("their-dist", POINTS, {"stranger": GOOD}, version="1.2")
    install("other-dist", {"pruner": {"mine": "stranger_2:Mine"}}, {"stranger_2": GOOD})
    result = prune("--pruner", "mine")
    assert result.exit_code == 2
    assert error_line(result) == (
        "pruner 'mine' is offered by other-dist 1.0 and their-dist 1.2: "
        "write other-dist:mine or their-dist:mine"
    )
    done = prune("--pruner", "their-dist:mine", "--top-up", "uniform", "--out", "out", "-q")
    assert done.exit_code == 0, done.stderr


def test_broken_plugins_are_found_by_check(install: Install, run: Any) -> None:
    modules = {f"stranger_{i}": source for i, (source, _, _) in enumerate(KINDS.values())}
    points = {f"bad{i}": f"stranger_{i}:Mine" for i in range(len(KINDS))}
    every = {"pruner": points | {"mine": "stranger:Mine"}}
    install("their-dist", every, modules | {"stranger": GOOD})
    result = run("plugins", "check", "mine", *points)
    assert result.exit_code == 1
    first, *others, last = result.stdout.splitlines()
    assert first == "pruner 'mine' (their-dist 1.0): ok"
    assert last == f"{len(KINDS) + 1} plugins, {len(KINDS)} broken"
    for i, ((_, said, _), line) in enumerate(zip(KINDS.values(), others, strict=True)):
        assert line.startswith(f"pruner 'bad{i}' (their-dist 1.0)")
        if "for linear" not in said:  # found by a check of its own, in other words
            assert said in line


def test_others_are_untouched(install: Install, prune: Any, run: Any, folder: Path) -> None:
    modules = {f"stranger_{i}": source for i, (source, _, _) in enumerate(KINDS.values())}
    points = {f"bad{i}": f"stranger_{i}:Mine" for i in range(len(KINDS))}
    install("their-dist", {"pruner": points | {"clash": "stranger_0:Mine"}}, modules)
    install("other-dist", {"pruner": {"clash": "stranger_0:Mine"}})
    assert run("--help").exit_code == 0
    assert run("prune", "--help").exit_code == 0
    said = json.loads(run("plugins", "list", "--role", "pruner", "--json").stdout)["plugins"]
    theirs = {x["name"]: x["status"] for x in said if x["distribution"] == "their-dist"}
    assert theirs == dict.fromkeys(points, "ok") | {"clash": "clash"}
    assert run("plugins", "show", "wanda").exit_code == 0
    assert run("plugins", "check", "wanda").exit_code == 0
    done = prune("--top-up", "uniform", "--out", "out", "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    assert not any(name in sys.modules for name in modules)


OLD = """
from dataclasses import dataclass
from neuroal import PrunedLinear, hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    '''Written when hooks had fewer arguments.'''

    @hookimpl
    def score_weights(self, weight):
        return weight.abs()

@dataclass(frozen=True, eq=False)
class Blocks:
    '''Written when hooks had fewer arguments.'''

    @hookimpl
    def propose_block_ratios(self, layout):
        from neuroal import Generation, Proposal
        yield Generation([Proposal(dict.fromkeys(layout.linears, 0.5))])

@dataclass(frozen=True, eq=False)
class Refiner:
    '''Written when hooks had fewer arguments, for a hook that is no more.'''

    @hookimpl
    def refine_mask(self, mask):
        return mask

    @hookimpl(optionalhook=True)
    def describe_refiner(self):
        return None
"""


def test_old_plugin_declares_fewer_arguments(
    install: Install, prune: Any, run: Any, folder: Path
) -> None:
    points = {
        "pruner": {"old": "stranger:Mine"},
        "block_ratios": {"old": "stranger:Blocks"},
        "refiner": {"old": "stranger:Refiner"},
    }
    install("their-dist", points, {"stranger": OLD}, requires=("neuroal>=0.0.1",))
    chosen = ("--pruner", "old", "--block-ratios", "old", "--refiner", "old")
    done = prune("--sparsity", "0.5", *chosen, "--out", "out", "--json", "-q")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(x["distribution"] == "their-dist" for x in report["plugins"]) == 3
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)
    checked = run("plugins", "check", "old", "--role", "pruner")
    assert checked.exit_code == 0, checked.stdout


LIGHT = """
import contextlib, io, sys
from neuroal.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    for arguments in (["--help"], ["plugins", "list"], ["plugins", "list", "--json"]):
        try:
            main(arguments, prog_name="neuroal")
        except SystemExit as stop:
            assert not stop.code, arguments
heavy = {"torch", "transformers", "datasets", "numpy", "neuroal_plugins", "packaging"}
print(sorted(name for name in sys.modules if name.startswith("stranger") or name in heavy))
"""


def test_ten_more_plugins_cost_no_import(install: Install, run_process: Callable[..., Any]) -> None:
    folders = [
        install(
            f"dist-{i}",
            {"pruner": {f"p{i}": f"stranger_{i}:Mine"}},
            {f"stranger_{i}": GOOD},
            requires=("neuroal>=0.0.1", "torch>=2"),
        )
        for i in range(10)
    ]
    path = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}"
    done = run_process([sys.executable, "-c", path + LIGHT])
    assert done.stdout == "[]\n", done.stderr

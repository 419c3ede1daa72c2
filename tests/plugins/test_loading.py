"""Plugins of real installed distributions, files and instances: found, checked, loaded, called."""

import dataclasses
import gc
import hashlib
import json
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from neuroal import hookimpl, plugins
from neuroal.errors import NeuroalError, PluginError, UsageError
from neuroal.hookspecs import ROLES
from neuroal.options import option
from neuroal.plugins import available, describe, find, load, load_top_up
from neuroal.testing import check_installed
from neuroal.types import Generation, Measurement, Pattern, Proposal, Target, TopUp
from neuroal.walk.statistics import Statistics

HEAD = """\
from __future__ import annotations
from dataclasses import dataclass
import neuroal
from neuroal import hookimpl, option
"""
PRUNER = (
    HEAD
    + """
@dataclass(frozen=True, eq=False)
class Mine:
    '''Scores by magnitude to a power.'''

    power: float = option(1.0, "exponent")

    @hookimpl
    def score_weights(self, weight):
        return weight.abs() ** self.power
"""
)

Install = Callable[..., Path]


@pytest.fixture
def one(install: Install) -> Callable[[str], plugins.Plugin]:
    """Installs one pruner called `mine` from a class body or a whole source, and loads it."""

    def make(source: str, role: str = "pruner") -> plugins.Plugin:
        install("their-dist", {role: {"mine": "stranger:Mine"}}, {"stranger": source})
        return load([(role, "mine")])[0]

    return make


def class_of(body: str, decorator: str = "@dataclass(frozen=True, eq=False)") -> str:
    """A module whose class `Mine` has the given body."""
    return (
        HEAD + f"{decorator}\nclass Mine:\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
    )


def line_of(error: pytest.ExceptionInfo[NeuroalError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def score(plugin: plugins.Plugin, weight: torch.Tensor) -> torch.Tensor:
    """One call of `score_weights`."""
    result: torch.Tensor = plugin.call(
        "score_weights", weight=weight, statistics=Statistics({}), linear=None
    )
    return result


def check() -> dict[str, str]:
    """What `neuroal plugins check` finds wrong with the plugins of `their-dist`, by name."""
    theirs = [x for x in available() if x.distribution == "their-dist"]
    return {x.name: error for x, error in check_installed(theirs)}


# Listing


def test_available_lists_without_importing(install: Install) -> None:
    install(
        "their-dist",
        {"pruner": {"zeta": "stranger_a:Z", "alpha": "stranger_b:A"}, "top_up": {"t": "x:T"}},
        version="2.3",
    )
    names = [(x.role, x.name) for x in available()]
    ranks = [([*ROLES, "top_up"].index(role), name) for role, name in names]
    assert ranks == sorted(ranks)
    assert {("pruner", "alpha"), ("pruner", "zeta"), ("top_up", "t")} <= set(names)
    listing = find("alpha", "pruner")[0]
    assert (listing.distribution, listing.version) == ("their-dist", "2.3")
    assert (listing.value, listing.clash) == ("stranger_b:A", False)
    assert "stranger_b" not in sys.modules
    assert {x.role for x in available("pruner")} == {"pruner"}


def test_available_is_quick(install: Install) -> None:
    for i in range(10):
        install(f"dist-{i}", {"pruner": {f"p{i}": f"stranger_{i}:P"}})
    available()
    start = time.process_time()
    assert len(available()) >= 10
    assert time.process_time() - start < 0.05


def test_available_refuses_unknown_role() -> None:
    with pytest.raises(UsageError, match="unknown role 'pruners': did you mean 'pruner'"):
        available("pruners")


def test_listing_and_file_plugin_load_no_torch(
    tmp_path: Path, run_process: Callable[..., Any]
) -> None:
    (tmp_path / "mine.py").write_text(PRUNER)
    code = (
        "import sys; from neuroal.plugins import *; available();"
        "load([('pruner', './mine.py:Mine')], {'mine': {'power': '2'}});"
        "assert 'torch' not in sys.modules"
    )
    done = run_process([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_clash_is_an_error_naming_both(install: Install) -> None:
    for i in (1, 2):
        source = PRUNER.replace("'''", f"'''{i}: ", 1)
        install(f"dist-{i}", {"pruner": {"mine": f"stranger{i}:Mine"}}, {f"stranger{i}": source})
    assert [x.clash for x in find("mine")] == [True, True]
    with pytest.raises(UsageError) as error:
        load([("pruner", "mine")])
    assert "dist-1:mine or dist-2:mine" in line_of(error)
    plugin = load([("pruner", "Dist_2:mine")])[0]
    assert (plugin.name, plugin.distribution) == ("mine", "dist-2")
    assert plugin.instance.__doc__.startswith("2:")


def test_same_name_in_two_roles_is_no_clash(install: Install) -> None:
    points = {"pruner": {"mine": "stranger:Mine"}, "refiner": {"mine": "stranger:Other"}}
    install("their-dist", points, {"stranger": PRUNER})
    assert [x.clash for x in find("mine")] == [False, False]
    assert load([("pruner", "mine")])[0].role == "pruner"


def test_damaged_metadata_hides_nothing_else(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("good-dist", {"pruner": {"mine": "stranger:Mine"}}, {"stranger": PRUNER})
    folder = install("bad-dist", {"pruner": {"other": "stranger:Mine"}})
    (folder / "bad_dist-1.0.dist-info" / "entry_points.txt").write_bytes(b"[neuroal.pruner]\n\xff")
    assert [x.name for x in available("pruner") if x.distribution.endswith("dist")] == ["mine"]
    assert "cannot be read" in caplog.text


def test_first_distribution_on_the_path_wins(install: Install) -> None:
    install("their-dist", {"pruner": {"mine": "stranger:Old"}})
    install("Their_Dist", {"pruner": {"mine": "stranger:New"}}, version="2.0")
    assert [(x.version, x.value) for x in find("mine")] == [("2.0", "stranger:New")]


# Names


@pytest.mark.parametrize(
    ("role", "name", "message"),
    [
        ("pruner", "minne", "unknown pruner 'minne': did you mean 'mine'?"),
        ("pruner", "their-dist:minne", "did you mean 'their-dist:mine'?"),
        ("pruner", "elsewhere", "it is of role refiner; "),
        ("pruner", "./none.py:Mine", "there is no file ./none.py"),
        ("top_up", "minne", "unknown top_up 'minne'"),
    ],
)
def test_unknown_name(install: Install, role: str, name: str, message: str) -> None:
    install("their-dist", {"pruner": {"mine": "s:Mine"}, "refiner": {"elsewhere": "s:Mine"}})
    with pytest.raises(UsageError) as error:
        load_top_up(name) if role == "top_up" else load([(role, name)])
    assert message in line_of(error)


def test_chosen_twice_is_refused(install: Install) -> None:
    install("their-dist", {"pruner": {"mine": "stranger:Mine"}}, {"stranger": PRUNER})
    with pytest.raises(UsageError, match="chosen twice"):
        load([("pruner", "mine"), ("pruner", "their-dist:mine")])
    instance = Power()
    with pytest.raises(UsageError, match="chosen twice"):
        load([("pruner", instance), ("pruner", instance)])
    assert len(load([("pruner", Power()), ("pruner", Power())])) == 2


# Loading


def test_load_binds_and_calls(install: Install) -> None:
    folder = install("their-dist", {"pruner": {"mine": "stranger:Mine"}}, {"stranger": PRUNER})
    plugin = load([("pruner", "mine")], {"mine": {"power": "2"}})[0]
    assert plugin.instance.power == 2.0
    assert plugin.has("score_weights")
    assert not plugin.has("prune_linear")
    assert torch.equal(score(plugin, torch.tensor([[-3.0]])), torch.tensor([[9.0]]))
    assert plugin.source == folder / "stranger.py"
    assert plugin.provenance() == {
        "role": "pruner",
        "name": "mine",
        "distribution": "their-dist",
        "version": "1.0",
        "options": {"power": 2.0},
        "sha256": hashlib.sha256((folder / "stranger.py").read_bytes()).hexdigest(),
    }
    json.dumps(plugin.provenance())


IMPORT_FAILURES = {
    "ImportError": ("from os import no_such_name", "ImportError: cannot import", "upgrade or"),
    "SyntaxError": ("def (:\n", "SyntaxError: invalid syntax (stranger.py, line 1)", "upgrade or"),
    "dependency": ("import no_such_pkg.sub", "No module named 'no_such_pkg'", "install no_such"),
    "exception": ("x = 1 / 0", "ZeroDivisionError: division by zero", "uninstall their-dist"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3", "uninstall their-dist"),
    "lines": ("raise OSError('a\\n  b')", "OSError: a b: ", "uninstall their-dist"),
    "frozen": (
        HEAD + "@dataclass\nclass A: ...\n@dataclass(frozen=True)\nclass Mine(A): ...",
        "cannot inherit frozen",
        "uninstall their-dist",
    ),
    "lazy": ("def __getattr__(name): import no_such_pkg", "No module named", "install no_such"),
}


@pytest.mark.parametrize("kind", IMPORT_FAILURES)
def test_import_failure(one: Callable[..., Any], kind: str) -> None:
    source, said, cure = IMPORT_FAILURES[kind]
    with pytest.raises(PluginError) as error:
        one(source)
    message = line_of(error)
    assert message.startswith("pruner 'mine' (their-dist 1.0): does not import: ")
    assert said in message
    assert cure in message
    assert error.value.__cause__ is not None


def test_module_that_is_not_there(install: Install) -> None:
    install("their-dist", {"pruner": {"mine": "stranger.gone:Mine"}})
    with pytest.raises(PluginError) as error:
        load([("pruner", "mine")])
    assert "No module named 'stranger'" in line_of(error)
    assert "reinstall their-dist" in line_of(error)


GOOD = "@hookimpl\ndef score_weights(self, weight): return weight"
BROKEN = {
    "no attribute": (PRUNER.replace("Mine", "Miner"), "there is no stranger:Mine: did you mean"),
    "a function": ("def Mine(): ...", "is function, not a class"),
    "an instance": (PRUNER + "Mine = Mine()", "is Mine, not a class: name the dataclass itself"),
    "no dataclass": (class_of(GOOD, "class X: ...\n"), "Mine is not a dataclass: decorate it with"),
    "undecorated subclass": (
        PRUNER.replace("Mine", "Base") + "class Mine(Base):\n    other: int = 1",
        "Mine is not a dataclass",
    ),
    "not frozen": (class_of(GOOD, "@dataclass(eq=False)"), "Mine is not frozen: decorate it with"),
    "eq": (class_of(GOOD, "@dataclass(frozen=True)"), "Mine compares by value"),
    "hash": (class_of(GOOD + "\ndef __hash__(self): return 1"), "Mine compares by value"),
    "no hook": (
        class_of("power: int = 1"),
        "has no hook score_weights or prune_linear or prune_linears",
    ),
    "unmarked": (
        class_of("def score_weights(self, weight): return weight"),
        "method score_weights is not marked: put @hookimpl",
    ),
    "unmarked optional": (
        class_of(GOOD + "\ndef required_statistics(self): return {'input_norm'}"),
        "method required_statistics is not marked",
    ),
    "only optional": (
        class_of("@hookimpl\ndef required_statistics(self): return {'input_norm'}"),
        "has no hook score_weights",
    ),
    "unknown hook": (
        class_of("@hookimpl\ndef score_weight(self, weight): return weight"),
        "hook score_weight is unknown: did you mean 'score_weights'?",
    ),
    "wrong role": (
        class_of(GOOD + "\n@hookimpl\ndef refine_mask(self, mask): return mask"),
        "hook refine_mask belongs to role refiner",
    ),
    "wrapper": (
        class_of("@hookimpl(wrapper=True)\ndef score_weights(self): return (yield)"),
        "hook score_weights is a wrapper",
    ),
    "unknown argument": (
        class_of("@hookimpl\ndef score_weights(self, weights): return weights"),
        "hook score_weights has no argument 'weights': did you mean 'weight'?",
    ),
    "default": (
        class_of("@hookimpl\ndef score_weights(self, weight, statistics=None): return weight"),
        "gives its argument 'statistics' a default",
    ),
    "varargs": (
        class_of("@hookimpl\ndef score_weights(self, *args): return args[0]"),
        "takes *args: name the arguments it wants (weight, statistics, linear)",
    ),
    "kwargs": (
        class_of("@hookimpl\ndef score_weights(self, weight, **rest): return weight"),
        "takes **rest: name the arguments",
    ),
    "keyword only": (
        class_of("@hookimpl\ndef score_weights(self, *, weight): return weight"),
        "keyword-only argument 'weight': remove the *",
    ),
    "no self": (
        class_of("@hookimpl\ndef score_weights(weight): return weight"),
        "hook score_weights has no self",
    ),
    "unreadable type": (class_of("power: Tensor = 1\n" + GOOD), "type cannot be read"),
    "list option": (
        class_of("powers: list = None\n" + GOOD),
        "option powers=None is not list: an option is bool, int,",
    ),
    "pair option": (
        class_of("betas: tuple[float, float] = (0.9, 0.99)\n" + GOOD),
        "is not tuple[float, float]: an option is",
    ),
    "wrong default": (class_of("k: int = 0.5\n" + GOOD), "option k=0.5 is not int"),
    "post init": (
        class_of("k: int = 0\ndef __post_init__(self): 1 / self.k\n" + GOOD),
        "refuses its options: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin(one: Callable[..., Any], kind: str) -> None:
    source, said = BROKEN[kind]
    with pytest.raises(PluginError) as error:
        one(source)
    message = line_of(error)
    assert message.startswith("pruner 'mine' (their-dist 1.0): ")
    assert said in message


def test_exclusive_role_takes_one_hook(one: Callable[..., Any]) -> None:
    body = (
        "@hookimpl\ndef measure_linear(self, dense): return 0\n"
        "@hookimpl\ndef measure_output(self, dense_logits): return 0"
    )
    with pytest.raises(PluginError, match=r"measure_linear and measure_output.*exactly one"):
        one(class_of(body), "alignment")


def test_broken_plugin_disturbs_nobody(install: Install) -> None:
    broken = {f"stranger_{i}": source for i, (source, _) in enumerate(BROKEN.values())}
    points = {f"bad{i}": f"stranger_{i}:Mine" for i in range(len(broken))}
    points["mine"] = "stranger:Mine"
    install("their-dist", {"pruner": points}, {"stranger": PRUNER} | broken)
    assert load([("pruner", "mine")])[0].has("score_weights")
    assert not any(name in sys.modules for name in broken)
    theirs = check()
    assert theirs.pop("mine") == ""
    assert len(theirs) == len(broken)
    assert all(error.startswith("pruner 'bad") for error in theirs.values())


def test_decorated_static_and_renamed_hooks(one: Callable[..., Any]) -> None:
    plugin = one(
        class_of(
            """
            @staticmethod
            @hookimpl
            def required_statistics(): return {"input_norm"}
            @hookimpl(specname="score_weights")
            def by_another_name(self, weight): return weight + 1
            @hookimpl(optionalhook=True)
            def hook_of_another_version(self, thing): ...
            @neuroal.hookimpl
            @neuroal_twice
            def describe(self): return 3
            """
        ).replace(
            "@dataclass(",
            "import functools\n"
            "def neuroal_twice(f): return functools.wraps(f)(lambda *a: f(*a) * 2)\n@dataclass(",
            1,
        )
    )
    assert plugin.statistic_names() == {"input_norm"}
    assert score(plugin, torch.zeros(1)).item() == 1
    assert plugin.call("describe") == 6
    assert not plugin.has("hook_of_another_version")


def test_old_plugin_declares_fewer_arguments(one: Callable[..., Any]) -> None:
    plugin = one(
        class_of("@hookimpl\ndef prune_linear(self, weight, target): return (weight, target)")
    )
    names = ("weight", "target", "statistics", "linear", "rng")
    assert plugin.call("prune_linear", **{k: k for k in names}) == ("weight", "target")


# Files


def test_file_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    monkeypatch.chdir(tmp_path)
    source = PRUNER.replace("class Mine", "class SparseGPTLike")
    (tmp_path / "mine.py").write_text(source)
    choice = "./mine.py:SparseGPTLike"
    plugin = load([("pruner", choice)], {"sparse_gpt_like": {"power": "3"}})[0]
    assert plugin.provenance() == {
        "role": "pruner",
        "name": "sparse_gpt_like",
        "distribution": "./mine.py",
        "version": "file",
        "options": {"power": 3.0},
        "sha256": hashlib.sha256(source.encode()).hexdigest(),
    }
    assert not (tmp_path / "__pycache__").exists()
    (tmp_path / "mine.py").write_text(source.replace("** self.power", "* 10"))  # edited: new code
    again = load([("pruner", choice)])[0]
    assert score(again, torch.ones(1)).item() == 10
    assert score(plugin, torch.full((1,), 2.0)).item() == 8


@pytest.mark.parametrize(
    ("source", "choice", "said"),
    [
        (PRUNER, "mine.py", "names no class: write mine.py:CLASS"),
        (PRUNER, "mine.py:", "names no class"),
        (PRUNER, "mine.py:Mein", "there is no mine.py:Mein: did you mean 'Mine'?"),
        ("1 / 0", "mine.py:Mine", "ZeroDivisionError: division by zero: correct it"),
        ("def (", "mine.py:Mine", "SyntaxError: invalid syntax (mine.py, line 1): correct it"),
        ("import no_such_pkg", "mine.py:Mine", "install no_such_pkg"),
    ],
)
def test_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, choice: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    before = set(sys.modules)
    with pytest.raises(NeuroalError) as error:
        load([("pruner", choice)])
    assert said in line_of(error)
    if "correct it" in said:
        assert not [x for x in set(sys.modules) - before if x.startswith("neuroal_file_")]


def test_two_classes_of_one_file_share_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.py").write_text(PRUNER + PRUNER.replace("Mine", "Yours").replace(HEAD, ""))
    a, b = load([("pruner", "./both.py:Mine"), ("pruner", "both.py:Yours")])
    assert (a.name, b.name) == ("mine", "yours")
    assert type(a.instance).__module__ == type(b.instance).__module__


# Instances


@dataclass(frozen=True, eq=False)
class Power:
    """|W| to a power."""

    power: float = option(1.0, "exponent")

    @hookimpl
    def score_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs() ** self.power


def test_instance() -> None:
    instance = Power(2.0)
    plugin = load([("pruner", instance)])[0]
    assert plugin.instance is instance
    assert (plugin.name, plugin.distribution, plugin.version) == ("power", "python", "instance")
    assert plugin.sha256 == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert plugin.provenance()["options"] == {"power": 2.0}


def test_instance_of_an_installed_plugin_has_its_name(install: Install) -> None:
    install("their-dist", {"pruner": {"my-own": "stranger:Mine"}}, {"stranger": PRUNER})
    instance = load([("pruner", "my-own")])[0].instance
    plugin = load([("pruner", dataclasses.replace(instance, power=3.0))])[0]
    assert (plugin.name, plugin.distribution, plugin.version) == ("my-own", "their-dist", "1.0")
    assert plugin.instance.power == 3.0


def test_instance_of_a_class_that_a_distribution_does_not_declare(install: Install) -> None:
    folder = install("their-dist", {"refiner": {"x": "stranger:X"}}, {"stranger": PRUNER})
    (folder / "their_dist-1.0.dist-info" / "top_level.txt").write_text("stranger\n")
    import stranger  # type: ignore[import-not-found]

    plugin = load([("pruner", stranger.Mine())])[0]
    assert (plugin.name, plugin.distribution, plugin.version) == ("mine", "their-dist", "1.0")


@pytest.mark.parametrize(
    ("choice", "options", "said"),
    [
        (Power, {}, "pruner Power is a class: give a name or an instance, Power()"),
        (3, {}, "int is not a dataclass"),
        (Power("x"), {}, "option power='x' is not float"),  # type: ignore[arg-type]
        (Power(torch.tensor(1.0)), {}, "is not float"),  # type: ignore[arg-type]
        (Power(float("inf")), {}, "option power=inf is not float"),
        (Power(), {"power": {"power": 2}}, "was given as an instance"),
    ],
)
def test_bad_instance(choice: object, options: Any, said: str) -> None:
    with pytest.raises(NeuroalError) as error:
        load([("pruner", choice)], options)
    assert said in line_of(error)


# Options


def two_roles(install: Install) -> list[tuple[str, object]]:
    body = "{}: int = 1\n@hookimpl\ndef {}(self):\n    yield"
    source = class_of(body.format("a", "propose_block_ratios"))
    second = class_of(body.format("b", "propose_row_ratios"))
    source += second.replace(HEAD, "").replace("Mine", "Yours")
    points = {"block_ratios": {"same": "stranger:Mine"}, "row_ratios": {"same": "stranger:Yours"}}
    install("their-dist", points, {"stranger": source})
    return [("block_ratios", "same"), ("row_ratios", "same")]


def test_options_reach_the_plugins_that_have_them(install: Install) -> None:
    choices = two_roles(install)
    blocks, rows = load(choices, {"same": {"a": 2, "b": "3"}})
    assert (blocks.instance.a, rows.instance.b) == (2, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"same": {"aa": 1}}, "plugin 'same' has no option 'aa': did you mean 'a'?"),
        ({"other": {"a": 1}}, "options for 'other', which is not used: this run uses same"),
        ({"same": {"a": "x"}}, "option same.a='x' is not int"),
        ({"same": 3}, "options for 'same' are 3"),
    ],
)
def test_bad_options(install: Install, options: Any, said: str) -> None:
    choices = two_roles(install)
    with pytest.raises(UsageError) as error:
        load(choices, options)
    assert said in line_of(error)


# Calling


def test_exception_is_attributed(one: Callable[..., Any]) -> None:
    plugin = one(class_of("@hookimpl\ndef score_weights(self, weight):\n    return 1 / 0"))
    with pytest.raises(PluginError) as error:
        score(plugin, torch.ones(1))
    assert line_of(error) == (
        "pruner 'mine' (their-dist 1.0), hook score_weights: ZeroDivisionError: division by zero "
        "(stranger.py, line 9): upgrade their-dist or use another plugin"
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("StopIteration(3)", "StopIteration: 3"),
        ("SystemExit(1)", "SystemExit: 1"),
        ("neuroal.UsageError('no')", "UsageError: no"),
        ("neuroal.PluginError('no')", "PluginError: no"),
        ("ValueError()", "ValueError (stranger.py"),
        ("ValueError('x' * 5000)", "x" * 300 + " (stranger.py"),
    ],
)
def test_every_exception_is_attributed(one: Callable[..., Any], raised: str, said: str) -> None:
    plugin = one(class_of(f"@hookimpl\ndef score_weights(self):\n    raise {raised}"))
    with pytest.raises(PluginError) as error:
        score(plugin, torch.ones(1))
    assert line_of(error).startswith("pruner 'mine' (their-dist 1.0), hook score_weights: ")
    assert said in line_of(error)


def test_interrupt_passes(one: Callable[..., Any]) -> None:
    plugin = one(class_of("@hookimpl\ndef score_weights(self):\n    raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        score(plugin, torch.ones(1))


def test_statistic_that_was_not_asked_for(one: Callable[..., Any]) -> None:
    plugin = one(class_of("@hookimpl\ndef score_weights(self, statistics): return statistics.gram"))
    with pytest.raises(PluginError, match=r"hook score_weights: .*name it in required_statistics"):
        score(plugin, torch.ones(1))


def test_none_is_no_answer(one: Callable[..., Any]) -> None:
    plugin = one(class_of("@hookimpl\ndef score_weights(self, weight): weight * 2"))
    with pytest.raises(PluginError, match="hook score_weights: returned None"):
        score(plugin, torch.ones(1))


REFINE = "@hookimpl\ndef refine_mask(self, weight, mask, scores, target, statistics): {}; return 1"


@pytest.mark.parametrize(
    ("write", "label"),
    [
        ("weight.abs_()", "weight"),
        ("weight[0].zero_()", "weight"),
        ("weight.detach().mul_(2)", "weight"),
        ("mask.fill_(True)", "mask"),
        ("target.counts.add_(1)", "target.counts"),
        ("statistics.input_norm.sqrt_()", "statistics.input_norm"),
        ("statistics['own'][0] = 1", "statistics.own"),
    ],
)
def test_write_to_an_input_is_noticed(one: Callable[..., Any], write: str, label: str) -> None:
    plugin = one(class_of(REFINE.format(write)), "refiner")
    with pytest.raises(PluginError) as error:
        plugin.call(
            "refine_mask",
            weight=torch.ones(2, 2),
            mask=torch.zeros(2, 2, dtype=torch.bool),
            scores=torch.ones(2, 2),
            target=Target(torch.ones(2, dtype=torch.int64), 0.5, Pattern(2, 4)),
            statistics=Statistics({"input_norm": torch.ones(2), "own": torch.ones(2)}),
            linear=None,
        )
    assert f"hook refine_mask: wrote to its input '{label}'" in line_of(error)


def test_write_into_a_mapping_of_sequences_is_noticed(one: Callable[..., Any]) -> None:
    body = "@hookimpl\ndef measure_block(self, weights): weights['q'][1].zero_(); return {}\n"
    body += "@hookimpl\ndef propose_block_ratios(self):\n    yield"
    plugin = one(class_of(body), "block_ratios")
    weights = {"q": [torch.ones(1), torch.ones(1)]}
    with pytest.raises(PluginError, match=r"wrote to its input 'weights\[q\]\[1\]'"):
        plugin.call("measure_block", block=None, weights=weights, statistics={})


def test_reading_is_no_write(one: Callable[..., Any]) -> None:
    plugin = one(
        class_of(REFINE.format("weight[0].abs() + mask.sum() + scores.clone().zero_()")), "refiner"
    )
    arguments = {k: torch.ones(2, 2) for k in ("weight", "mask", "scores")}
    with torch.inference_mode():  # whose tensors have no version counter
        arguments["scores"] = torch.ones(2, 2)
        plugin.call("refine_mask", **arguments, target=None, statistics=None, linear=None)


def test_wrong_arguments_are_the_engines_fault(one: Callable[..., Any]) -> None:
    plugin = one(PRUNER)
    with pytest.raises(TypeError, match="score_weights takes weight, statistics, linear"):
        plugin.call("score_weights", weight=torch.ones(1))
    with pytest.raises(PluginError, match="hook describe: the plugin does not have it"):
        plugin.call("describe")


@pytest.mark.parametrize("answer", ["'input_norm'", "3", "None", "{[]}"])
def test_bad_required_statistics(one: Callable[..., Any], answer: str) -> None:
    plugin = one(class_of(GOOD + f"\n@hookimpl\ndef required_statistics(self): return {answer}"))
    with pytest.raises(PluginError, match="hook required_statistics: "):
        plugin.required_statistics()


def test_no_required_statistics(one: Callable[..., Any]) -> None:
    assert one(PRUNER).required_statistics() == frozenset()


# Proposals

PROPOSE = "@hookimpl\ndef propose_block_ratios(self, sparsity, measurements, rng):\n"


def propose(plugin: plugins.Plugin, **arguments: Any) -> Any:
    given = {"layout": None, "sparsity": 0.5, "measurements": (), "windows": 8, "rng": None}
    return plugin.proposals("propose_block_ratios", **(given | arguments))


def blocks(one: Callable[..., Any], *lines: str) -> plugins.Plugin:
    body = PROPOSE + "".join(f"    {line}\n" for line in lines)
    plugin: plugins.Plugin = one(class_of(body), "block_ratios")
    return plugin


def test_proposals_hear_and_return(one: Callable[..., Any]) -> None:
    plugin = blocks(
        one,
        "heard = yield neuroal.Generation([neuroal.Proposal({'q': sparsity})])",
        "yield neuroal.Generation([neuroal.Proposal({}, {'heard': heard[0].misalignment})])",
        "return neuroal.Proposal({'q': 0.25})",
    )
    steps = propose(plugin)
    assert next(steps) == Generation([Proposal({"q": 0.5})])
    assert steps.send([Measurement(7.0, False, 1)]).proposals[0].parameters == {"heard": 7.0}
    with pytest.raises(StopIteration) as stop:
        steps.send([])
    assert stop.value.value == Proposal({"q": 0.25})


def test_proposals_may_end_with_none(one: Callable[..., Any]) -> None:
    with pytest.raises(StopIteration) as stop:
        next(propose(blocks(one, "yield from ()")))
    assert stop.value.value is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["return neuroal.Proposal({})"], "returned Proposal, not a generator: yield a Generation"),
        (["return None"], "returned None"),
        (["yield neuroal.Proposal({})"], "yielded Proposal: yield a Generation"),
        (["yield"], "yielded NoneType: yield a Generation"),
        (["yield neuroal.Generation([])"], "without proposals"),
        (["yield neuroal.Generation(neuroal.Proposal({}))"], "without proposals"),
        (["yield neuroal.Generation([{}])"], "a Generation of dict"),
        (["yield neuroal.Generation([neuroal.Proposal({})], windows=0)"], "windows=0"),
        (["yield neuroal.Generation([neuroal.Proposal({})], windows='2')"], "TypeError: "),
        (["yield neuroal.Generation([neuroal.Proposal({})], 2)"], "TypeError: "),
        (
            ["yield neuroal.Generation([neuroal.Proposal({})], reuse_first_weights=True)"],
            "give it probe=True",
        ),
        (["yield from ()", "return {}"], "returned dict: return a Proposal or None"),
        (["yield from ()", "return 1 / 0"], "ZeroDivisionError: division by zero (stranger.py"),
        (["measurements[0]['x'].add_(1)", "yield"], "wrote to its input 'measurements[0][x]'"),
    ],
)
def test_generator_misuse(one: Callable[..., Any], lines: list[str], said: str) -> None:
    plugin = blocks(one, *lines)
    with pytest.raises(PluginError) as error:
        next(propose(plugin, measurements=[{"x": torch.ones(1)}]))
    message = line_of(error)
    assert message.startswith("block_ratios 'mine' (their-dist 1.0), hook propose_block_ratios: ")
    assert said in message


def test_later_step_is_attributed(one: Callable[..., Any]) -> None:
    step = "yield neuroal.Generation([neuroal.Proposal({})])"
    steps = propose(
        blocks(one, step, "measurements[0].add_(1)", step), measurements=[torch.ones(1)]
    )
    next(steps)
    with pytest.raises(PluginError, match=r"wrote to its input 'measurements\[0\]'"):
        steps.send([])


def test_engine_may_write_between_steps(one: Callable[..., Any]) -> None:
    step = "yield neuroal.Generation([neuroal.Proposal({})])"
    tensor = torch.ones(1)
    steps = propose(blocks(one, step, step), measurements=[tensor])
    next(steps)
    tensor.add_(1)
    assert isinstance(steps.send([]), Generation)


def test_closing_closes_the_plugins_generator(one: Callable[..., Any]) -> None:
    step = "yield neuroal.Generation([neuroal.Proposal({})])"
    log: list[str] = []
    plugin = blocks(one, "try:", f"    {step}", "finally:", "    rng.append('closed')")
    steps = propose(plugin, rng=log)
    next(steps)
    steps.close()
    assert log == ["closed"]


# Many plugins, many runs


def test_answers_do_not_depend_on_order(install: Install) -> None:
    chosen = [("pruner", Power(float(p))) for p in (1, 2, 3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        loaded = load([chosen[i] for i in order])
        answers = [score(p, torch.full((1,), 2.0)).item() for p in loaded]
        assert answers == [2.0 ** (i + 1) for i in order]


def test_loads_do_not_leak_into_each_other() -> None:
    first, second = load([("pruner", Power(1.0))])[0], load([("pruner", Power(2.0))])[0]
    two = torch.full((1,), 2.0)
    assert (score(first, two).item(), score(second, two).item()) == (2.0, 4.0)
    gone = weakref.ref(second.instance)
    del second
    gc.collect()
    assert gone() is None
    assert score(first, two).item() == 2.0


# Presets and descriptions

TOP_UPS = """
from neuroal import TopUp
GOOD = TopUp(row_ratios="neuroal", help="A preset.")
STRING = TopUp(block_ratios="owl")
OTHER = {"row_ratios": "neuroal"}
NONE = TopUp(search_samples=0)
"""


def test_top_ups(install: Install) -> None:
    points = {"good": "stranger:GOOD", "string": "stranger:STRING", "other": "stranger:OTHER"}
    points["none"] = "stranger:NONE"
    install("their-dist", {"top_up": points}, {"stranger": TOP_UPS})
    assert load_top_up("good") == TopUp(row_ratios="neuroal", help="A preset.")
    with pytest.raises(PluginError, match=r"top_up 'string' \(their-dist 1.0\): block_ratios is a"):
        load_top_up("their-dist:string")
    with pytest.raises(PluginError, match=r"is dict: make it a neuroal.TopUp"):
        load_top_up("other")
    with pytest.raises(PluginError, match=r"search_samples 0 is not a positive number"):
        load_top_up("none")
    found = describe(find("good", "top_up")[0])
    assert found.doc == "A preset."
    assert ("row_ratios", "", "neuroal", "") in found.options
    assert [name for name, error in check().items() if not error] == ["good"]


def test_describe(install: Install) -> None:
    folder = install("their-dist", {"pruner": {"mine": "stranger:Mine"}}, {"stranger": PRUNER})
    found = describe(find("mine")[0])
    assert found.doc == "Scores by magnitude to a power."
    assert found.options == (("power", "float", "1.0", "exponent"),)
    assert found.hooks == ("score_weights",)
    assert found.source == folder / "stranger.py"
    assert found.sha256 == hashlib.sha256((folder / "stranger.py").read_bytes()).hexdigest()


def test_describe_of_a_broken_plugin(install: Install) -> None:
    install("their-dist", {"pruner": {"mine": "stranger:Mine"}}, {"stranger": "1 / 0"})
    with pytest.raises(PluginError, match="does not import"):
        describe(find("mine")[0])


def test_check_of_a_required_option(install: Install) -> None:
    source = PRUNER.replace(' = option(1.0, "exponent")', "")
    install("their-dist", {"pruner": {"mine": "stranger:Mine"}}, {"stranger": source})
    said = "plugin 'mine' needs the option mine.power (float)"
    assert check() == {"mine": f"pruner 'mine' (their-dist 1.0): {said}"}
    assert load([("pruner", "mine")], {"mine": {"power": "2"}})[0].instance.power == 2.0

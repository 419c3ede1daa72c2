"""Whose plugins may load: allow-lists, versions that do not fit, requirements of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import neuroal
from neuroal import Recipe, hookimpl
from neuroal.cli import main
from neuroal.errors import PluginError, UsageError
from neuroal.plugins import available, check_requirements, describe, find, load, load_top_up
from neuroal.plugins.trust import ENVIRONMENT, only, unmet
from neuroal.run.setup import setup

PRUNER = """
from dataclasses import dataclass
from neuroal import hookimpl, TopUp

@dataclass(frozen=True, eq=False)
class Mine:
    '''Scores by magnitude.'''

    @hookimpl
    def score_weights(self, weight):
        return weight.abs()

PRESET = TopUp()
"""
POINTS = {"pruner": {"mine": "stranger:Mine"}, "top_up": {"preset": "stranger:PRESET"}}
Install = Callable[..., Path]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="neuroal")


def statuses(distribution: str) -> set[str]:
    return {x.status for x in available() if x.distribution == distribution}


@dataclass(frozen=True, eq=False)
class Own:
    """Scores by magnitude."""

    @hookimpl
    def score_weights(self, weight: Any) -> Any:
        return weight.abs()


# Allow-lists


def test_everything_may_load_without_a_list(install: Install) -> None:
    install("their-dist", POINTS, {"stranger": PRUNER})
    assert statuses("their-dist") == {"ok"}
    assert load([("pruner", "mine")])[0].name == "mine"


def test_only_listed_distributions_load(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("their-dist", POINTS, {"stranger": PRUNER})
    install("other-dist", {"pruner": {"other": "stranger_2:Mine"}}, {"stranger_2": PRUNER})
    monkeypatch.setenv(ENVIRONMENT, "Other.Dist, more")
    assert (statuses("their-dist"), statuses("other-dist")) == ({"not allowed"}, {"ok"})
    assert [p.name for p in load([("pruner", "wanda"), ("pruner", "other")])] == ["wanda", "other"]
    said = (
        r"pruner 'mine' \(their-dist 1.0\): may not load: only more, neuroal, other-dist may "
        r"\(--only-plugins, NEUROAL_ONLY_PLUGINS\): add their-dist"
    )
    with pytest.raises(UsageError, match=said):
        load([("pruner", "mine")])
    with pytest.raises(UsageError, match="may not load"):
        load([("pruner", "their-dist:mine")])
    with pytest.raises(UsageError, match="may not load"):
        load_top_up("preset")
    for listing in find("mine") + find("preset"):
        with pytest.raises(UsageError, match="may not load"):
            describe(listing)
    import sys

    assert "stranger" not in sys.modules


def test_unlisted_distribution_cannot_take_a_name(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("evil-dist", {"pruner": {"wanda": "stranger:Mine"}}, {"stranger": PRUNER})
    with pytest.raises(UsageError, match=r"is offered by evil-dist 1\.0 and neuroal"):
        load([("pruner", "wanda")])
    monkeypatch.setenv(ENVIRONMENT, "neuroal")
    assert load([("pruner", "wanda")])[0].distribution == "neuroal"
    assert statuses("evil-dist") == {"not allowed"}
    assert next(x for x in find("wanda") if x.distribution == "neuroal").status == "ok"


def test_files_and_instances_have_to_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(PRUNER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, "neuroal")
    with pytest.raises(UsageError, match=r"\./mine.py file\): may not load: .*: add \./"):
        load([("pruner", "./mine.py:Mine")])
    with pytest.raises(UsageError, match=r"python instance\): may not load: .*: add python"):
        load([("pruner", Own())])
    monkeypatch.setenv(ENVIRONMENT, "./,python")
    assert len(load([("pruner", "./mine.py:Mine"), ("pruner", Own())])) == 2


def test_no_distribution_can_be_called_python(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("python", POINTS, {"stranger": PRUNER})
    monkeypatch.setenv(ENVIRONMENT, "python")
    assert statuses("python") == {"not allowed"}


def test_option_of_the_command_line(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("their-dist", POINTS, {"stranger": PRUNER})
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    given = ("--only-plugins", "other-dist")
    said = json.loads(run(*given, "plugins", "list", "--json").stdout)["plugins"]
    assert {x["status"] for x in said if x["distribution"] == "their-dist"} == {"not allowed"}
    assert "not allowed" in run(*given, "plugins", "list").stdout
    result = run(*given, "prune", "demo", "--pruner", "mine", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: pruner 'mine' (their-dist 1.0): may not load: ")
    assert result.stderr.count("\n") == 1
    assert ENVIRONMENT not in __import__("os").environ
    assert run("plugins", "show", "mine").exit_code == 0


@pytest.mark.parametrize("names", ["", " , ", "a b", "./mine.py", "-x"])
def test_malformed_list(names: str) -> None:
    result = run("--only-plugins", names, "plugins", "list")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: Invalid value for '--only-plugins'")
    with pytest.raises(UsageError), only(names):
        pass


# Versions


@pytest.mark.parametrize(
    ("requirement", "needs"),
    [
        ("neuroal", ""),
        ("neuroal>=0.0.1", ""),
        (f"neuroal>={neuroal.__version__}", ""),
        (f"neuroal>={neuroal.__version__}.0", ""),
        (f"neuroal>={neuroal.__version__}.1", f"neuroal>={neuroal.__version__}.1"),
        ("neuroal (>=0.0.1)", ""),
        (f"neuroal=={neuroal.__version__}", ""),
        ("neuroal>=99", "neuroal>=99"),
        ("NeuroAL[test]<0.0.1", "neuroal<0.0.1"),
        ("neuroal~=99.1; python_version>='3'", "neuroal~=99.1"),
        ("neuroal>=99; python_version<'3'", ""),
        ("neuroal>=99; extra == 'later'", ""),
        ("neuroal-something>=99", ""),
        ("neuroal_something>=99", ""),
        ("neuroalx>=99", ""),
        ("neuroal >= what", ""),
    ],
)
def test_unmet(requirement: str, needs: str) -> None:
    assert unmet(["torch>=2", requirement]) == needs


def test_incompatible_plugin_is_listed_and_refused(install: Install) -> None:
    install("their-dist", POINTS, {"stranger": "1 / 0"}, requires=("torch", "neuroal>=99"))
    assert statuses("their-dist") == {"incompatible"}
    assert "incompatible: needs neuroal>=99" in run("plugins", "list").stdout
    with pytest.raises(PluginError) as error:
        load([("pruner", "mine")])
    assert str(error.value) == (
        f"pruner 'mine' (their-dist 1.0): needs neuroal>=99, and this is {neuroal.__version__}: "
        "install a neuroal that fits, or another version of their-dist"
    )
    assert run("plugins", "check", "mine").exit_code == 1


# Recipes


def test_recipe_requires(install: Install) -> None:
    install("their-dist", POINTS, {"stranger": PRUNER}, version="1.5")
    setup(Recipe(pruner="mine", requires=("their-dist>=1.2", "neuroal", "Their_Dist<2")))


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("their-dist>=2", "the recipe requires their-dist>=2, and 1.5 is installed: pip install"),
        ("none-such>=1", "none-such>=1, and it is not installed: pip install 'none-such>=1'"),
        ("their-dist=>2", "requirement 'their-dist=>2' is malformed: write distribution>=version"),
    ],
)
def test_recipe_requires_what_is_not_there(install: Install, requirement: str, said: str) -> None:
    install("their-dist", POINTS, {"stranger": PRUNER}, version="1.5")
    with pytest.raises(UsageError) as error:
        setup(Recipe(pruner="unknown to anybody", requires=(requirement,)))  # before the plugins
    assert said in str(error.value)
    with pytest.raises(UsageError):
        check_requirements([requirement])


def test_recipe_round_trip() -> None:
    recipe = Recipe(requires=("their-dist>=1.2,<2", "other"))
    data = json.loads(json.dumps(recipe.to_json()))
    assert data["requires"] == ["their-dist>=1.2,<2", "other"]
    assert Recipe.from_json(data) == recipe
    assert Recipe(requires=["other"]).requires == ("other",)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="requires is a string: write"):
        Recipe(requires="other")  # type: ignore[arg-type]


def test_recipe_file_requires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"model": "demo", "requires": ["none-such>=1"]}
    Path("recipe.json").write_text(json.dumps(recipe))
    result = run("prune", "--recipe", "recipe.json", "--out", "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: the recipe requires none-such>=1")


# Code that a recipe or a study names, and not the user

EVIL = (
    PRUNER
    + """
from pathlib import Path
Path("ran").touch()
"""
)
STUDY = """
models = ["demo"]
pruners = [{pruner}]
top_ups = [{top_up}]
sparsities = [0.5]
[[evaluations]]
{evaluation}
"""


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file that leaves a trace where it runs."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(EVIL)
    return tmp_path


NAMED: dict[str, dict[str, Any]] = {
    "pruner": {"pruner": "./evil.py:Mine"},
    "top_up": {"top_up": "evil.py:PRESET"},
    "block_ratios": {"block_ratios": ["uniform", "./evil.py:Mine"]},
    "refiner": {"refiner": "/nowhere/../evil.py:Mine"},
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("form", ["json", "toml", "report"])
def test_a_recipe_runs_no_file_unasked(name: str, form: str, strange: Path) -> None:
    recipe = {"model": "demo", **NAMED[name]}
    if form == "toml":
        lines = [f"{key} = {json.dumps(value)}" for key, value in recipe.items()]
        Path("recipe.toml").write_text("\n".join(lines))
    else:
        content = {"schema": 1, "recipe": recipe} if form == "report" else recipe
        Path("recipe.json").write_text(json.dumps(content))
    file = "recipe.toml" if form == "toml" else "recipe.json"
    for more in ([], ["--dry-run"], ["--seed", "1", "-o", "mine.x=1"], ["--resume"]):
        result = run("prune", "--recipe", file, "--out", "out", *more)
        assert result.exit_code == 2
        assert f"'{file}' names " in result.stderr
        assert "whose code would run: read it, then add --allow-plugin-files" in result.stderr
    assert not Path("ran").exists() and not Path("out").exists()


def test_a_recipe_runs_files_that_are_asked_for(strange: Path) -> None:
    recipe = {"model": "demo", "pruner": "./evil.py:Mine", "top_up": "uniform"}
    Path("recipe.json").write_text(json.dumps(recipe))
    for more in (["--allow-plugin-files"], ["--pruner", "./evil.py:Mine"]):
        assert run("prune", "--recipe", "recipe.json", *more, "--dry-run").exit_code == 0
        assert Path("ran").exists()
    assert (
        run("prune", "--recipe", "recipe.json", "--pruner", "magnitude", "--dry-run").exit_code == 0
    )


def test_a_file_that_is_not_the_recorded_one(strange: Path) -> None:
    mine = ("--pruner", "./evil.py:Mine", "--top-up", "uniform", "--sparsity", "0.5", "-q")
    assert run("prune", "demo", *mine, "--out", "one").exit_code == 0
    again = ("prune", "--recipe", "one/neuroal.json", "-q", "--dry-run", "--json")
    assert run(*again, "--allow-plugin-files").exit_code == 0
    Path("evil.py").write_text(EVIL + "# another\n")
    Path("ran").unlink()
    result = run(*again, "--allow-plugin-files")
    assert result.exit_code == 2 and "its SHA-256 differs" in result.stderr
    assert not Path("ran").exists()
    assert run(*again, "--pruner", "./evil.py:Mine").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruner": '"./evil.py:Mine"'}, "evil.py:Mine"),
        ({"top_up": '"./evil.py:PRESET"'}, "evil.py:PRESET"),
        ({"top_up": '{name = "uniform", row_ratios = "evil.py:Mine"}'}, "evil.py:Mine"),
        ({"evaluation": 'tasks = ["mine"]\ninclude_path = "tasks"'}, "tasks"),
    ],
)
def test_a_study_runs_no_file_unasked(changes: dict[str, str], said: str, strange: Path) -> None:
    (strange / "tasks").mkdir()
    (strange / "tasks/mine.yaml").write_text("task: mine\ndoc_to_text: !function evil.Mine\n")
    plain = {"pruner": '"wanda"', "top_up": '"uniform"', "evaluation": 'data = "demo"'}
    Path("study.toml").write_text(STUDY.format(**(plain | changes)))
    for command in ("plan", "run"):
        result = run("study", command, "study.toml")
        assert result.exit_code == 2
        assert f"names '{said}', whose code would run" in result.stderr
    assert not Path("ran").exists()
    assert sorted(p.name for p in strange.iterdir()) == ["evil.py", "study.toml", "tasks"]

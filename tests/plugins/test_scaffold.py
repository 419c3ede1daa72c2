"""`neuroal plugins new` writes packages that install and pass as they are written."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from neuroal.cli import main
from neuroal.errors import UsageError
from neuroal.hookspecs import ROLES
from neuroal.plugins import load, scaffold
from neuroal.testing import failures

FromSource = Callable[..., dict[str, str]]
Run = Callable[..., subprocess.CompletedProcess[str]]
FILES = {
    ".github/workflows/test.yml",
    ".gitignore",
    "README.md",
    "pyproject.toml",
    "src/neuroal_my_own/__init__.py",
    "src/neuroal_my_own/py.typed",
    "tests/test_neuroal_my_own.py",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def new(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "new", *arguments], prog_name="neuroal")


@pytest.mark.parametrize("role", ROLES)
def test_package_is_complete(role: str, here: Path) -> None:
    result = new("my-own", "--role", role.replace("_", "-"))
    assert result.exit_code == 0, result.output
    folder = here / "neuroal-my-own"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {str(path.relative_to(folder)) for path in files} == FILES
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "$" not in text, path
        if path.suffix == ".py":
            assert max(map(len, text.splitlines()), default=0) <= 100, path
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "neuroal-my-own"
    points = project["entry-points"]
    assert points == {f"neuroal.{role}": {"my-own": "neuroal_my_own:MyOwn"}}
    shown = result.stdout.splitlines()
    assert shown[0] == "written to neuroal-my-own; go on with"
    flag = "to" if role == "exporter" else role.replace("_", "-")
    assert shown[-1].startswith("  neuroal ") and f" --{flag} my-own --out " in shown[-1]


@pytest.fixture
def own_tests(run_process: Run) -> Run:
    """Runs the package's own tests, in a process of their own: `own_tests(folder, environment)`."""

    def run(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
        return run_process(command, cwd=folder, env=environment)

    return run


@pytest.mark.parametrize("role", ROLES)
def test_plugin_passes_as_written(role: str, here: Path) -> None:
    source = scaffold.write("my_own", role) / "src/neuroal_my_own/__init__.py"
    (plugin,) = load([(role, f"{source}:MyOwn")])
    assert not list(failures(plugin))


@pytest.mark.parametrize(
    "role",
    [role if role == "pruner" else pytest.param(role, marks=pytest.mark.matrix) for role in ROLES],
)
def test_package_passes_as_written(
    role: str, here: Path, from_source: FromSource, own_tests: Run, run_process: Run
) -> None:
    folder = scaffold.write("my_own", role)
    environment = from_source(folder)
    done = own_tests(folder, environment)
    assert done.returncode == 0, done.stdout
    assert " failed" not in done.stdout and " passed" in done.stdout
    command = [sys.executable, "-m", "neuroal", "plugins", "check", "my_own", "--json"]
    done = run_process(command, env=environment)
    said = json.loads(done.stdout)
    assert said["broken"] == 0
    assert [(x["role"], x["name"]) for x in said["plugins"]] == [(role, "my_own")]


def test_package_that_is_broken_fails(here: Path, from_source: FromSource, own_tests: Run) -> None:
    folder = scaffold.write("my_own", "pruner")
    source = folder / "src/neuroal_my_own/__init__.py"
    text = source.read_text()
    assert "weight.abs() *" in text
    source.write_text(text.replace("weight.abs() *", "weight.abs_() *"))
    done = own_tests(folder, from_source(folder))
    assert done.returncode == 1
    assert "wrote to its input 'weight'" in done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Mine", "'Mine' is no name for a plugin: write small letters"),
        ("2ssp", "is no name"),
        ("my own", "is no name"),
        ("my--own", "is no name"),
        ("-own", "is no name"),
        ("../own", "is no name"),
        ("", "is no name"),
        ("none", "would make a class None, which is taken"),
        ("tensor", "would make a class Tensor, which is taken"),
        ("statistics", "would make a class Statistics, which is taken"),
        ("plugins", "would make the package neuroal_plugins, which is taken"),
        ("wanda", "there is a pruner 'wanda' (neuroal "),
    ],
)
def test_bad_name(name: str, said: str, here: Path) -> None:
    with pytest.raises(UsageError) as error:
        scaffold.write(name, "pruner")
    assert said in str(error.value)
    assert list(here.iterdir()) == []


def test_existing_folder_is_refused(here: Path) -> None:
    (here / "out").mkdir()
    with pytest.raises(UsageError, match="'out' exists: give another folder"):
        scaffold.write("mine", "pruner", Path("out"))
    assert list((here / "out").iterdir()) == []
    assert scaffold.write("mine", "pruner", Path("deep/er")) == Path("deep/er")
    assert (here / "deep/er/pyproject.toml").is_file()


def test_command_line_errors(here: Path) -> None:
    result = new("mine", "--role", "prunr")
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: unknown role 'prunr': did you mean 'pruner'?\n",
    )
    assert new("mine").exit_code == 2
    assert new("--role", "pruner").exit_code == 2
    assert list(here.iterdir()) == []

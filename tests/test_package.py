"""The package as a whole: what importing it costs, what it declares, what its text may not say."""

import importlib.metadata
import importlib.resources
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neuroal

Probe = Callable[..., tuple[str, list[str]]]
HEAVY = ("torch", "transformers", "datasets", "neuroal_plugins")
OURS = [
    point
    for point in importlib.metadata.distribution("neuroal").entry_points
    if point.group.startswith("neuroal.")
]

# Runs the code given as the first argument, then says which modules are loaded.
PROBE = """
import json, sys
code, sys.argv = sys.argv[1], ["neuroal", *sys.argv[2:]]
status = 0
try:
    exec(code)
except SystemExit as stop:
    status = stop.code or 0
print("\\n" + json.dumps({"status": status, "modules": sorted(sys.modules)}))
"""
RUN = "import runpy; runpy.run_module('neuroal', run_name='__main__')"


@pytest.fixture
def probe(tmp_path: Path, run_process: Callable[..., Any]) -> Probe:
    """What a fresh interpreter printed, and the modules it had loaded at the end."""

    def run(*arguments: str) -> tuple[str, list[str]]:
        done = run_process([sys.executable, "-c", PROBE, *arguments], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        output, _, last = done.stdout.rstrip().rpartition("\n")
        said = json.loads(last)
        assert said["status"] == 0, output + done.stderr
        return output, said["modules"]

    return run


def heavy(modules: list[str]) -> list[str]:
    return [name for name in modules if name.partition(".")[0] in HEAVY]


@pytest.mark.parametrize("code", ["import neuroal", "import neuroal; neuroal.__version__"])
def test_import_is_light(code: str, probe: Probe) -> None:
    _, modules = probe(code)
    assert "neuroal" in modules
    assert heavy(modules) == []


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["plugins", "list"]])
def test_command_is_light(arguments: list[str], probe: Probe) -> None:
    output, modules = probe(RUN, *arguments)
    assert output.strip()
    assert "neuroal.cli" in modules
    assert heavy(modules) == []


def test_probe_sees_heavy_modules(probe: Probe) -> None:
    _, modules = probe("import neuroal_plugins")
    assert heavy(modules)


def test_plugins_list_names_every_declared_plugin(probe: Probe) -> None:
    output, _ = probe(RUN, "plugins", "list")
    for point in OURS:
        assert re.search(rf"(?<![\w-]){re.escape(point.name)}(?![\w-])", output), point.name


def test_version_is_the_distributions() -> None:
    assert neuroal.__version__ == importlib.metadata.version("neuroal")


def test_public_names_resolve() -> None:
    assert set(neuroal.__all__) <= set(dir(neuroal))
    for name in neuroal.__all__:
        assert getattr(neuroal, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        neuroal.no_such_name  # noqa: B018


@pytest.mark.parametrize("point", OURS, ids=lambda point: f"{point.group}-{point.name}")
def test_declared_plugin_loads(point: importlib.metadata.EntryPoint) -> None:
    assert point.load() is not None


def test_contributing_lists_the_rooms_of_the_import_contract(project: Path) -> None:
    contracts = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in contracts["contracts"] if c["id"] == "layers")
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$",
        (project / "CONTRIBUTING.md").read_text(),
        re.MULTILINE,
    )
    assert [room for room, _ in rows] == [room for layer in layers for room in layer.split(" : ")]
    for room, files in rows:
        for name in re.findall(r"`(\w+)`", files):
            assert (project / "neuroal" / room / f"{name}.py").is_file(), f"{room}/{name}"


def test_every_room_has_a_folder_of_tests(project: Path) -> None:
    rooms = {path.parent.name for path in (project / "neuroal").glob("*/__init__.py")}
    assert len(rooms) > 10
    assert rooms <= {path.parent.name for path in (project / "tests").glob("*/test_*.py")}


@pytest.mark.parametrize("package", ["neuroal", "neuroal_plugins"])
def test_types_are_shipped(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_demo_model_is_shipped() -> None:
    model = importlib.resources.files("neuroal").joinpath("demo", "model")
    names = {entry.name for entry in model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


# A path that starts at the root of somebody's disk, and the folder of a temporary environment.
LOCAL_PATH = re.compile(r"(?<![\w.~$})/>])/(?:home|root|Users|work|mnt|srv|opt|tmp)/\w[\w./-]*")
FOLDERS = (".ci", "benchmarks", "docs", "neuroal", "plugins", "tests")
BINARY = {".gz", ".parquet", ".png", ".pyc", ".safetensors"}


def test_text_names_no_local_path(project: Path) -> None:
    # in a worktree, .git is a file that says where the repository lies
    files = [path for path in project.iterdir() if path.is_file() and path.name != ".git"]
    for folder in FOLDERS:
        files += (path for path in (project / folder).rglob("*") if path.is_file())
    found = [
        f"{path.relative_to(project)}: {match}"
        for path in files
        if path.suffix not in BINARY
        for match in LOCAL_PATH.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 10
    assert found == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see " + "/home" + "/me/model", ["/home" + "/me/model"]),
        ("#!/usr/bin/env bash", []),
        ("https://host/home/page", []),
        ("../shared/models and docs/home/x", []),
    ],
)
def test_local_path_pattern(text: str, expected: list[str]) -> None:
    assert LOCAL_PATH.findall(text) == expected

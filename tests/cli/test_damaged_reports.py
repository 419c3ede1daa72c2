"""A damaged `neuroal.json` or recipe either does, or is refused in one line that names the key."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from neuroal import Recipe, UsageError
from neuroal.cli import main
from neuroal.evaluation import comparison
from neuroal.html_report.reading import read_run
from neuroal.html_report.runs import run_section
from neuroal.run.model_card import model_card

MISSING = "missing"
RETYPED = (None, 7, [7])
STRANGE = [None, True, -1, 0, 10**30, 0.5, 1e308, float("nan"), "", "\ud800", [], {}, [[]], [None]]
COMMANDS = {
    "report": ("report", "run", "--out", "page.html", "--overwrite"),
    "compare": ("compare", "run", "run"),
    "prune": ("prune", "--recipe", "run/neuroal.json", "--dry-run", "-q"),
}


@pytest.fixture(scope="module")
def root(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has a search and an evaluation."""
    root = tmp_path_factory.mktemp("finished")
    text = root / "text.txt"
    text.write_text("The quick brown fox. " * 40)
    given = ["--samples", 2, "--length", 16, "--search-samples", 1, "--device", "cpu"]
    given += ["--calibration", text, "--evaluate", text, "--evaluate-length", 16]
    given += [
        "--top-up",
        "neuroal",
        "-o",
        "linear_schedule.lambdas=0.05",
        "-o",
        "neuroal.lambdas=0.1",
    ]
    result = call("prune", tiny, *given, "--out", root / "run")
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "run/neuroal.json").read_text()))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="neuroal")


TEXT = ("--length", 16, "--device", "cpu", "-q")
STEPS = ("--data", "text.txt", "--steps", 2, *TEXT)
KINDS = {
    "searched": ("--top-up", "neuroal-fast", "--evaluate", "text.txt", "--evaluate-length", 16),
    "of an effort": ("--effort", "low"),
    "2:4": ("--pruner", "sparsegpt", "--pattern", "2:4", "--top-up", "uniform", "--save-masks"),
    "rebuilt": ("--refiner", "dsnot", "--reconstruction", "refit", "--save-packed"),
    "streamed": ("--pruner", "magnitude", "--top-up", "uniform", "--stream", "--keep", "*.v_proj"),
    "of ratios over depth": ("--sparsity", "0.4,0.6", "--top-up", "uniform"),
}
LATER = {
    "evaluated": ("evaluate", "2:4", "--data", "text.txt", *TEXT),
    "measured on tasks": ("evaluate", "2:4", "--tasks", "goings", "--include-path", ".", "-q"),
    "benched": ("bench", "2:4", "--prompt", 4, "--tokens", 2, "--repeats", 1, "-q"),
    "packed": ("pack", "searched", "--out", "packed", "-q"),
    "trained": ("finetune", "2:4", *STEPS, "--out", "trained"),
    "by lora": ("finetune", "2:4", "--lora", 2, "--distil", *STEPS, "--out", "by lora"),
    "applied": ("apply", "tiny", "2:4/masks.safetensors", "--out", "applied", "-q"),
}  # fmt: skip
TASK = """task: goings
dataset_path: json
dataset_kwargs: {data_files: {test: goings.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_what_runs_write_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of every kind of run pass the check, again and again, also where they are resumed."""
    monkeypatch.setattr("neuroal.html_report.page.draw", lambda *_: "<svg></svg>")
    (folder / "goings.yaml").write_text(TASK)
    row = {"ctx": "The cook went", "endings": ["home.", "red."], "label": 0}
    (folder / "goings.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    data = ("--calibration", "text.txt", "--samples", 2, "--search-samples", 1, *TEXT)
    commands = {name: ("prune", "tiny", *data, *how, "--out", name) for name, how in KINDS.items()}
    for name, command in (commands | LATER).items():
        needs = {"--tasks": "lm_eval", "finetune": "accelerate", "--lora": "peft"}
        needs["--stream"] = "transformers.conversion_mapping"
        if any(word in command and find_spec(needs[word]) is None for word in needs):
            continue
        result = call(*command)
        assert result.exit_code == 0, (name, result.output)
        run = name if Path(name).is_dir() else "2:4"
        readers = [("report", run, "--out", "page.html", "--overwrite"), ("compare", run, run)]
        for reader in [*readers, ("verify", run), ("evaluate", run, "--data", "text.txt", *TEXT)]:
            result = call(*reader)
            assert result.exit_code == 0, (name, reader, result.output)
    for name, command in (commands | {"trained": LATER["trained"]}).items():
        if Path(name).is_dir():  # with what was measured of it since
            result = call(*command, "--resume")
            assert result.exit_code == 0, (name, result.output)


def changes(
    whole: Mapping[str, Any], levels: int, retyped: Sequence[Any] = RETYPED
) -> Iterator[tuple[str, Any]]:
    """Yield a report with each key of its upper levels missing or of another type."""
    for place in [(key,) for key in whole] + [
        (key, inner)
        for key, part in whole.items()
        if levels > 1 and isinstance(part, (dict, list))
        for inner in (part if isinstance(part, dict) else range(len(part)))
    ]:
        for change in (MISSING, *retyped):
            report = copy.deepcopy(whole)
            holder = report if len(place) == 1 else report[place[0]]
            holder[place[-1]] = change
            if change == MISSING:
                del holder[place[-1]]
            yield f"{place} {change}", report


def nested(tree: Any) -> list[tuple[Any, Any]]:
    """Every value of a JSON tree: what holds it, and its key or index."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found += [(tree, key), *(nested(value) if isinstance(value, (dict, list)) else ())]
    return found


def use(folder: Path) -> None:
    """Do in this process what a report, a card and a comparison make of a run, but for drawings."""
    found = read_run(folder)
    run_section(found)
    model_card(found.report)
    side = comparison.read_side(str(folder))
    comparison.check_comparable(side, side)
    list(comparison.differences(side, side))
    comparison.evaluations(side, side)


def test_each_key_of_a_report(whole: dict[str, Any], root: Path, tmp_path: Path) -> None:
    file = tmp_path / "neuroal.json"
    file.write_text(json.dumps(whole))
    (tmp_path / "allocation.safetensors").symlink_to(root / "run/allocation.safetensors")
    use(tmp_path)
    refused = set()
    for name, report in changes(whole, 2):
        file.write_text(json.dumps(report))
        try:
            use(tmp_path)
        except UsageError as error:
            assert "\n" not in str(error) and str(file) in str(error), name
            refused.add(name.split("'")[1])
    assert refused == {*whole}


def test_random_places_of_a_report(whole: dict[str, Any], root: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "allocation.safetensors").symlink_to(root / "run/allocation.safetensors")
    for _ in range(200):
        report = copy.deepcopy(whole)
        holder, key = rng.choice(nested(report))
        if rng.random() < 0.25:
            del holder[key]
        else:
            holder[key] = rng.choice(STRANGE)
        (tmp_path / "neuroal.json").write_text(json.dumps(report))
        try:
            use(tmp_path)
        except UsageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    command: str, whole: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr("neuroal.html_report.page.draw", lambda *_: "<svg></svg>")
    for name, report in changes(whole, 1, [7]):
        Path("run/neuroal.json").write_text(json.dumps(report))
        result = call(*COMMANDS[command])
        if result.exit_code:
            assert result.exit_code == 2, (name, result.output)
            (line,) = result.stderr.splitlines()
            assert line.startswith("Error: ") and "traceback" not in line, name
    Path("run/neuroal.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("linears",), MISSING, "linears is missing"),
        (("linears",), {}, "linears is empty"),
        (("sparsity", "wanted"), "half", "sparsity.wanted is not a ratio in [0, 1]"),
        (("plugins", 0, "role"), MISSING, "plugins[0].role is missing"),
        (("candidates", 0, "misalignment"), [], "candidates[0].misalignment is not a measured"),
        (("recipe", "samples"), [1], "recipe's samples=[1] is not int"),
        (("training",), {"losses": 1}, "training.settings is missing"),
    ],
)
def test_the_line_names_the_key(
    place: tuple[Any, ...], value: Any, said: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    report = copy.deepcopy(whole)
    holder = report
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    if value == MISSING:
        del holder[place[-1]]
    (tmp_path / "neuroal.json").write_text(json.dumps(report))
    result = call("report", tmp_path, "--out", tmp_path / "page.html")
    assert f"neuroal.json' is damaged: {said}" in result.stderr
    assert result.stderr.endswith("take the run's own file again, or run it again\n")


WRONG = [None, True, 7, 0.5, "x", [7], [None], [["x"]], [{}], {"a": 7}, {"a": {"b": {}}}, {}]


KEYS = list(Recipe().to_json())


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *((key, WRONG[i % 3 :: 3]) for i, key in enumerate(KEYS)),
        *(pytest.param(key, WRONG, marks=pytest.mark.matrix) for key in KEYS),
    ],
    ids=[*(f"{key}, some" for key in KEYS), *(f"{key}, all" for key in KEYS)],
)
def test_each_key_of_a_recipe(key: str, wrong: list[Any], tmp_path: Path) -> None:
    """What a recipe takes, the rest of the command takes too, or refuses in a line."""
    file = tmp_path / "recipe.json"
    for value in wrong:
        recipe = {"model": "demo", "pruner": "magnitude", "top_up": "uniform", key: value}
        file.write_text(json.dumps(recipe))
        result = call("prune", "--recipe", file, "--dry-run", "-q")
        if result.exit_code:
            lines = result.stderr.splitlines()
            assert lines[-1].startswith("Error: "), (value, result.output)
            assert "traceback" not in lines[-1], (value, lines[-1])

"""What is known without weights is answered before anything is timed, and most of it even before
the model's structure is made."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from neuroal.cost import plan as plan_module
from neuroal.model import pretrained


@pytest.fixture
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the run, it would be timed; and no weight can be read."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed, or loaded, before it was checked")

    monkeypatch.setattr(plan_module, "LONG", 0.0)
    monkeypatch.setattr(plan_module, "time_block", never)
    monkeypatch.setattr(pretrained, "one_block", never)
    monkeypatch.setattr(pretrained, "load", never)


@pytest.fixture
def folder(models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and rows of tokens."""
    (tmp_path / "tiny").symlink_to(models["llama"])
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(models["llama"] / name)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a b c", "title": "t"}) + "\n")
    (tmp_path / "list.json").write_text(json.dumps([{"content": "a b c"}]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES: dict[str, tuple[list[str], str]] = {
    "pruner": (["--pruner", "wandra"], "did you mean 'wanda'"),
    "top-up": (["--top-up", "neural"], "did you mean 'neuroal'"),
    "alignment": (["--alignment", "neurn"], "did you mean 'neuron'"),
    "refiner": (["--refiner", "dsno"], "did you mean 'dsnot'"),
    "column": (["--calibration", "text.jsonl:txt"], "no column 'txt': did you mean 'text'?"),
    "no column": (["--calibration", "list.json"], "no column 'text' or 'input_ids'"),
    "no file": (["--calibration", "texts.jsonl"], "does not exist"),
    "option": (["-o", "wanda.alpha=1"], "wanda"),
    "sparsity": (["--sparsity", "1.2"], "outside [0, 1)"),
    "length": (["--length", "65"], "length 65 is more than the model's context of 64 tokens"),
    "device": (["--device", "cuda:7"], "device 'cuda:7' is not available"),
}
WITH_THE_MODEL: dict[str, tuple[list[str], str]] = {
    "pattern": (["--pattern", "5:7"], "does not divide the"),
}


@pytest.mark.parametrize("how", [[], ["--dry-run"], ["--quiet"]])
@pytest.mark.parametrize("mistake", [*MISTAKES, *WITH_THE_MODEL])
def test_checked_before_timing(
    mistake: str,
    how: list[str],
    folder: Path,
    run: Callable[..., Any],
    nothing_is_timed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, said = (MISTAKES | WITH_THE_MODEL)[mistake]
    if mistake in MISTAKES:
        monkeypatch.setattr(pretrained, "skeleton", None)
    text = [] if "--calibration" in given else ["--calibration", "text.jsonl"]
    result = run("prune", "tiny", *text, *given, *how, "--out", "out")
    assert result.exit_code in (1, 2), result.stderr
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not Path("out.partial").exists()


@pytest.mark.parametrize("how", [[], ["--quiet"]])
def test_a_missing_source_is_known_from_the_plugins(
    how: list[str],
    folder: Path,
    run: Callable[..., Any],
    nothing_is_timed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrained, "skeleton", None)
    result = run("prune", "tiny", *how)
    assert result.exit_code == 2 and "needs calibration" in result.stderr


def test_a_text_without_a_tokenizer(
    folder: Path, run: Callable[..., Any], nothing_is_timed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "skeleton", None)
    result = run("prune", "bare", "--calibration", "text.jsonl")
    assert result.exit_code == 1 and "no tokenizer to read 'text.jsonl' with" in result.stderr


STUDY = """
models = [{ name = "tiny", calibration = "text.jsonl" }]
evaluations = [{ data = "text.jsonl" }]
sparsities = [0.5]
"""
WRONG: dict[str, tuple[str, str, str]] = {
    "column": ('calibration = "text.jsonl"', 'calibration = "text.jsonl:x"', "no column 'x'"),
    "evaluation": ('data = "text.jsonl"', 'data = "text.jsonl:x"', "no column 'x'"),
    "length": ("sparsities", "calibration.length = 99\nsparsities", "99 is more than the model's"),
    "windows": ('data = "text.jsonl"', 'data = "text.jsonl", length = 99', "length 99 is more"),
    "pruner": ("sparsities", 'pruners = ["wandra"]\nsparsities', "did you mean 'wanda'"),
    "top-up": ("sparsities", 'top_ups = ["neural"]\nsparsities', "top_ups[1]: unknown top_up"),
    "metric": (
        "sparsities",
        'top_ups = [{ name = "neuroal", alignment = "neurn" }]\nsparsities',
        "did you mean 'neuron'",
    ),
    "model": ('name = "tiny"', 'name = "./tini"', "models[1] 'tini': model './tini' is neither"),
    "no file": ('calibration = "text.jsonl"', 'calibration = "texts.jsonl"', "does not exist"),
    "no text": ('data = "text.jsonl"', 'data = "texts.jsonl"', "evaluations[1]: no such file"),
    "requires": ("sparsities", 'requires = ["neuroal-nothing"]\nsparsities', "neuroal-nothing"),
}


# What is typed, and what it is answered: without torch, so within a blink.
BEFORE_TORCH: list[tuple[list[str], str]] = [
    *((["prune", "tiny", *given], said) for key, (given, said) in MISTAKES.items()
      if key not in ("length", "option", "device")),
    (["prune", "./tini"], "did you mean 'tiny'"),
    (["prune", "tiny", "--length", "65", "--calibration", "text.jsonl"], "length 65 is more than"),
    (["prune", "bare", "--calibration", "text.jsonl"], "no tokenizer to read 'text.jsonl' with"),
    (["prune", "tiny", "--length", "99", "--calibration", "text.jsonl", "--stream"], "99 is more"),
    (["prune", "tiny", "--evaluate", "nothing.txt"], "does not exist"),
    (["prune", "tiny", "--evaluate", "text.jsonl:x"], "no column 'x'"),
    (["prune", "tiny", "--evaluate", "text.jsonl", "--evaluate-length", "99"], "99 is more than"),
    (["evaluate", "tiny", "--data", "nothing.txt"], "does not exist"),
    (["evaluate", "tiny", "--data", "text.jsonl:x"], "no column 'x'"),
    (["evaluate", "tiny", "--data", "text.jsonl", "--length", "99"], "length 99 is more than"),
    (["evaluate", "./tini", "--data", "text.jsonl"], "did you mean 'tiny'"),
    (["evaluate", "./tini", "--tasks", "paper"], "did you mean 'tiny'"),
    (["compare", "one", "two", "--data", "text.jsonl:x"], "no column 'x'"),
    (["layout", "./tini"], "did you mean 'tiny'"),
    (["apply", "./tini", "run", "--out", "out"], "did you mean 'tiny'"),
    *((["study", "plan", f"{key}.toml"], WRONG[key][2]) for key in WRONG),
    *((["study", "run", f"{key}.toml"], WRONG[key][2]) for key in WRONG),
]  # fmt: skip
PROGRAM = """
import json, sys
from click.testing import CliRunner
from neuroal.cli import main
answers = [CliRunner().invoke(main, x) for x in json.loads(sys.argv[1])]
heavy = ["torch", "transformers", "datasets", "neuroal_plugins.pruner"]
heavy = [x for x in heavy if x in sys.modules]
print(json.dumps({"heavy": heavy, "answers": [[x.exit_code, x.stderr] for x in answers]}))
"""


def test_mistakes_are_found_before_torch_is_imported(
    folder: Path, run_process: Callable[..., Any]
) -> None:
    for key, (right, wrong, _) in WRONG.items():
        Path(f"{key}.toml").write_text(STUDY.replace(right, wrong))
    asked = json.dumps([typed for typed, _ in BEFORE_TORCH])
    said = json.loads(run_process([sys.executable, "-c", PROGRAM, asked], cwd=folder).stdout)
    for (typed, words), (code, line) in zip(BEFORE_TORCH, said["answers"], strict=True):
        assert code in (1, 2) and words in line and line.count("\n") == 1, f"{typed}: {line}"
    assert said["heavy"] == []


@pytest.mark.parametrize("mistake", WRONG)
def test_a_study_is_checked_before_timing(
    mistake: str, folder: Path, run: Callable[..., Any], nothing_is_timed: None
) -> None:
    right, wrong, said = WRONG[mistake]
    Path("study.toml").write_text(STUDY.replace(right, wrong))
    result = run("study", "plan", "study.toml")
    assert result.exit_code in (1, 2) and said in result.stderr, result.stderr


def test_a_study_is_timed_without_loading_a_model(
    folder: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "load", None)
    words = "a b c d e f g h " * 40
    Path("text.jsonl").write_text(json.dumps({"text": words}) + "\n")
    Path("study.toml").write_text(
        STUDY.replace('data = "text.jsonl"', 'data = "text.jsonl", length = 8')
    )
    result = run("study", "plan", "study.toml", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["estimate"]["seconds"] > 0


FITS = STUDY.replace("sparsities", "calibration.length = 2\nsparsities").replace(
    'data = "text.jsonl"', 'data = "text.jsonl", length = 2'
)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            "calibration.length = 2",
            "calibration.length = 32",
            "models[1] 'tiny': no document of 'text.jsonl' is longer than 32 tokens",
        ),
        (
            'data = "text.jsonl", length = 2',
            'data = "text.jsonl", length = 32',
            "models[1] 'tiny': evaluation 'text': the text of 'text.jsonl' has ",
        ),
    ],
)
def test_a_study_with_too_little_text(
    right: str, wrong: str, said: str, folder: Path, run: Callable[..., Any], nothing_is_timed: None
) -> None:
    Path("study.toml").write_text(FITS)
    assert run("study", "plan", "study.toml", "--no-time").exit_code == 0
    Path("study.toml").write_text(FITS.replace(right, wrong))
    result = run("study", "plan", "study.toml")
    assert result.exit_code == 1 and said in result.stderr and result.stderr.count("\n") == 1


def test_a_plan_says_what_is_known_of_texts(folder: Path, run: Callable[..., Any]) -> None:
    words = ["a b c d e f g h " * 40, "a", "b"]
    Path("text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in words))
    Path("study.toml").write_text(FITS.replace("length = 2", "length = 8"))
    said = run("study", "plan", "study.toml", "--no-time").stdout
    assert (
        "Note: tiny: 2 of 3 documents are too short for a window of 8 tokens; windows come" in said
    )
    (note,) = json.loads(run("study", "plan", "study.toml", "--no-time", "--json").stdout)["notes"]
    assert f"Note: {note}" in said


def test_a_large_text_is_not_made_tokens_of(
    folder: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroal.study.texts.LARGE", 10)
    Path("study.toml").write_text(STUDY)  # far too short
    said = run("study", "plan", "study.toml", "--no-time").stdout
    assert "Note: tiny: 'text.jsonl' is large: its windows are cut by the run alone" in said

"""Bad input ends in one clear line and the right exit code, and leaves nothing on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

PLUGIN = '''\
from dataclasses import dataclass
import torch
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    """A pruner that goes wrong."""

    @hookimpl
    def score_weights(self, weight):
        {body}
'''
ROWS = '''\
from dataclasses import dataclass
from neuroal import hookimpl

@dataclass(frozen=True, eq=False)
class Mine:
    """A row-ratio plugin that goes wrong after the block step has been measured."""

    @hookimpl
    def propose_row_ratios(self, layout):
        raise ValueError("rows of no use")
        yield
'''


def tree(folder: Path) -> dict[str, int]:
    files = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): p.stat().st_size for p in files if p.is_file()} | {
        str(p.relative_to(folder)): -1 for p in folder.rglob("*") if p.is_dir()
    }


def one_line(result: Any) -> str:
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert "Traceback" not in result.stderr
    return str(result.stderr)


USAGE = {
    "unknown pruner": (["--pruner", "wandb"], "did you mean 'wanda'?"),
    "unknown top-up": (["--top-up", "neural"], "did you mean 'neuroal'?"),
    "unknown block ratios": (["--block-ratios", "linear_schedul"], "'linear_schedule'?"),
    "unknown row ratios": (["--row-ratios", "neurol"], "did you mean 'neuroal'?"),
    "unknown alignment": (["--alignment", "neurons"], "did you mean 'neuron'?"),
    "unknown refiner": (["--refiner", "dsnoot"], "unknown refiner 'dsnoot'"),
    "unknown reconstruction": (["--reconstruction", "refits"], "did you mean 'refit'?"),
    "plugin of another role": (["--pruner", "linear_schedule"], "it is of role block_ratios"),
    "no such plugin file": (["--pruner", "./mine.py:Mine"], "there is no file ./mine.py"),
    "unknown plugin option": (
        ["--top-up", "neuroal", "-o", "linear_schedule.lambda=0.1"],
        "did you mean 'lambdas'?",
    ),
    "option of a wrong type": (
        ["--top-up", "neuroal", "-o", "linear_schedule.lambdas=a"],
        "is not list of float",
    ),
    "option without a value": (["-o", "linear_schedule.lambdas"], "is not PLUGIN.key=value"),
    "option without a plugin": (["-o", "lambdas=0.1"], "such as -o linear_schedule.lambdas="),
    "option of no plugin in use": (["-o", "magnitude.x=1"], "which is not used"),
    "unknown flag": (["--sparsitty", "0.5"], "'--sparsity'"),
    "sparsity of 1.2": (["--sparsity", "1.2"], "'--sparsity': 1.2 is outside [0, 1) (see"),
    "sparsity as a percentage": (
        ["--sparsity", "60"],
        "'--sparsity': 60 is outside [0, 1): did you mean 0.6?",
    ),
    "negative sparsity": (["--sparsity", "-0.1"], "outside [0, 1)"),
    "sparsity of nan": (["--sparsity", "nan"], "outside [0, 1)"),
    "sparsity of no number": (["--sparsity", "half"], "'half' is not a number, nor several with"),
    "no samples": (["--samples", "0"], "samples 0 is not a positive number"),
    "unknown pattern": (["--pattern", "2-4"], "neither 'unstructured' nor N:M"),
    "impossible pattern": (["--pattern", "5:4"], "N must be in [1, M]"),
    "rows under a pattern": (["--pattern", "2:4", "--row-ratios", "neuroal"], "row ratios"),
    "unknown budget": (["--budget", "exakt"], "'exact'"),
    "unknown device": (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    "unknown source": (["--calibration", "wikitext3"], "did you mean 'wikitext2'?"),
    "no such file": (["--calibration", "nothing.jsonl"], "'nothing.jsonl' does not exist"),
    "resume and overwrite": (["--resume", "--overwrite"], "exclude each other"),
    "no such recipe": (["--recipe", "nothing.json"], "cannot read recipe 'nothing.json'"),
    "a recipe that is none": (["--recipe", "rows.jsonl"], "recipe"),
    "samples beyond 31 bits": (["--samples", "9" * 20], "is too large: give at most"),
    "a seed beyond 31 bits": (["--seed", "9" * 30], "is too large: give at most"),
    "a long source": (["--calibration", "x/" * 1500], ""),
    "ratios and allocation": (["--allocation", "x", "--row-ratios", "neuroal"], "--allocation"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(name: str, folder: Path, prune: Any) -> None:
    arguments, expected = USAGE[name]
    before = tree(folder)
    result = prune(*arguments, "--out", "out")
    assert expected in one_line(result)
    assert result.exit_code == 2
    assert tree(folder) == before


def test_no_model(folder: Path, run: Any) -> None:
    result = run("prune")
    assert "give a MODEL" in one_line(result)
    assert result.exit_code == 2


def test_model_without_calibration(folder: Path, run: Any) -> None:
    before = tree(folder)
    result = run("prune", "tiny")
    line = one_line(result)
    assert "needs calibration (--calibration)" in line and ".jsonl" in line and "wikitext2" in line
    assert result.exit_code == 2
    assert tree(folder) == before


def test_evaluate_says_first_that_a_model_is_not_there(folder: Path, run: Any) -> None:
    line = one_line(run("evaluate", "./tin"))
    assert "model './tin' is neither a folder, a hub name nor 'demo': did you mean 'tiny'?" in line
    line = one_line(run("evaluate", "tin"))
    assert "model 'tin' is no folder here (did you mean 'tiny'?): as a name on the hub it" in line
    assert "needs --data" in line and "no folder" not in one_line(run("evaluate", "tiny"))


def test_unknown_command(run: Any) -> None:
    result = run("prnue")
    assert "did you mean 'prune'" in one_line(result).lower()
    assert result.exit_code == 2


DATA = {
    "empty text": ("empty.txt", "", "is empty"),
    "empty lines": ("empty.jsonl", "", "is empty"),
    "blank text": ("empty.txt", " \n\n ", "is empty"),
    "no JSON": ("bad.jsonl", "{", "line 1 of 'bad.jsonl' is not JSON"),
    "no column": ("bad.jsonl", '{"words": "w1 w2"}', "no column 'text' or 'input_ids'"),
    "too short": ("short.txt", "short", "is longer than 64 tokens, the longest has 5"),
    "foreign token ids": ("rows2.jsonl", '{"input_ids": [1, 2, 99]}', "has the token id 99"),
}


@pytest.mark.parametrize("name", DATA)
def test_calibration(name: str, folder: Path, run: Any) -> None:
    file, text, expected = DATA[name]
    Path(file).write_text(text)
    before = tree(folder)
    result = run("prune", "tiny", "--calibration", file, "--samples", 1)
    assert expected in one_line(result)
    assert result.exit_code == 1
    assert tree(folder) == before


@pytest.mark.parametrize("command", ["prune", "evaluate", "layout"])
def test_folder_that_is_no_model(command: str, folder: Path, run: Any) -> None:
    Path("nothing").mkdir()
    before = tree(folder)
    data = {"prune": ["--calibration", "rows.jsonl"], "evaluate": ["--data", "text.txt"]}
    result = run(command, "nothing", *data.get(command, []))
    assert "folder 'nothing' is no model" in one_line(result)
    assert result.exit_code == 1
    assert tree(folder) == before


def test_model_that_is_not_here(folder: Path, run: Any) -> None:
    result = run("prune", "no/such-model", "--calibration", "rows.jsonl")
    assert "'no/such-model': no such folder, and on the hub: " in one_line(result)
    assert result.exit_code == 1


def test_weights_with_nan(folder: Path, prune: Any) -> None:
    file = Path("tiny/model.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    before = tree(folder)
    result = prune()
    assert "'model.layers.1.mlp.up_proj' holds NaN" in one_line(result)
    assert result.exit_code == 1
    assert tree(folder) == before


@pytest.mark.parametrize("damage", ["cut", "missing", "config"])
def test_damaged_model(damage: str, folder: Path, prune: Any) -> None:
    file = Path("tiny/model.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        file.unlink()
    else:
        Path("tiny/config.json").write_text("{}")
    before = tree(folder)
    result = prune()
    assert "tiny" in one_line(result)
    assert result.exit_code == 1
    assert tree(folder) == before


PLUGINS = {
    "raises": ("raise KeyError('x')", "KeyError: 'x' (mine.py, line 11)"),
    "wrong shape": ("return weight.abs().sum(dim=1)", "(32,)"),
    "NaN": ("return weight.abs() * float('nan')", "NaN"),
    "None": ("weight.abs()", "returned None"),
    "writes to its input": ("weight.zero_(); return weight", "wrote to its input 'weight'"),
}


@pytest.mark.parametrize("top_up", ["uniform", "neuroal"])
@pytest.mark.parametrize("name", PLUGINS)
def test_broken_pruner(name: str, top_up: str, folder: Path, prune: Any) -> None:
    body, expected = PLUGINS[name]
    Path("mine.py").write_text(PLUGIN.format(body=body))
    before = tree(folder)
    result = prune("--pruner", "./mine.py:Mine", "--top-up", top_up)
    line = one_line(result)
    assert expected in line
    assert "pruner 'mine' (./mine.py file), hook score_weights" in line
    assert result.exit_code == 1
    assert tree(folder) == before


def test_plugin_that_breaks_after_the_block_step(folder: Path, prune: Any) -> None:
    Path("mine.py").write_text(ROWS)
    before = tree(folder)
    result = prune("--row-ratios", "./mine.py:Mine")
    assert "rows of no use" in one_line(result)
    assert result.exit_code == 1
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nothing_of_this_name", "does not import: ModuleNotFoundError"),
        ("def broken(:", "does not import: SyntaxError"),
        ("x = 1", "there is no ./mine.py:Mine"),
        ("class Mine: pass", "is not a dataclass"),
    ],
)
def test_plugin_that_does_not_load(text: str, expected: str, folder: Path, prune: Any) -> None:
    Path("mine.py").write_text(text)
    before = tree(folder)
    result = prune("--pruner", "./mine.py:Mine")
    assert expected in one_line(result)
    assert result.exit_code == 1
    assert tree(folder) == before


def test_existing_output_folder(folder: Path, prune: Any) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep me")
    before = tree(folder)
    result = prune("--out", "out")
    assert "output folder 'out' exists" in one_line(result)
    assert result.exit_code == 2
    result = prune("--out", "out", "--overwrite")
    assert "was not written by neuroal" in one_line(result)
    assert result.exit_code == 2
    assert tree(folder) == before


def test_evaluate(folder: Path, run: Any) -> None:
    Path("short.txt").write_text("short")
    Path("empty.txt").write_text("")
    for arguments, expected, code in (
        ([], "needs --data", 2),
        (["--data", "nothing.txt"], "does not exist", 2),
        (["--data", "empty.txt"], "is empty", 1),
        (["--data", "short.txt"], "fewer than one window of 64", 1),
        (["--data", "text.txt", "--length", 65], "context of 64 tokens", 2),
        (["--data", "text.txt", "--length", 1], "at least 2 tokens", 2),
        (["--data", "text.txt", "--windows", 0], "0 windows are too few", 2),
    ):
        result = run("evaluate", "tiny", *arguments)
        assert expected in one_line(result)
        assert result.exit_code == code


def test_failed_overwrite_keeps_the_earlier_run(folder: Path, prune: Any) -> None:
    assert prune("--out", "out", "--top-up", "uniform", "-q").exit_code == 0
    Path("mine.py").write_text(PLUGIN.format(body="raise KeyError('x')"))
    before = tree(folder)
    assert prune("--out", "out", "--overwrite", "--pruner", "./mine.py:Mine").exit_code == 1
    assert tree(folder) == before
    assert json.loads(Path("out/neuroal.json").read_text())["recipe"]["pruner"] == "wanda"


def test_more_windows_than_memory_holds(folder: Path, run: Any) -> None:
    before = tree(folder)
    for more in ([], ["--dry-run"]):
        asked = ("--calibration", "text.txt", "--length", 16, "--samples", 2_000_000_000)
        result = run("prune", "tiny", *asked, *more)
        assert "2,000,000,000 windows of 16 tokens take" in one_line(result)
        assert "give fewer --samples" in result.stderr and result.exit_code == 1
    assert tree(folder) == before


LACKS = {
    "disk": (OSError(28, "No space left on device", "out/x"), "--resume goes on with a run"),
    "disk of a library": (RuntimeError("I/O error: No space left on device"), "make room"),
    "disk of torch": (RuntimeError("[enforce fail] . unexpected pos 14400 vs 14288"), "make room"),
    "stream of torch": (RuntimeError("basic_ios::clear: iostream error"), "make room"),
    "a file too large": (OSError(27, "File too large"), "the disk is too small"),
    "memory": (MemoryError(), "--stream, --spill or a smaller --batch"),
    "memory of torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory is"),
    "an accelerator's": (RuntimeError("CUDA out of memory. Tried"), "memory is too small"),
    "a file that is locked": (PermissionError(13, "Permission denied", "a/b"), "'a/b': Permission"),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_the_system_lacks_is_said_with_its_cure(
    name: str, folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuroal.model import pretrained

    error, said = LACKS[name]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pretrained, "save", fail)
    more = ("--pruner", "magnitude", "--top-up", "uniform", "--sparsity", "0.5")
    result = run("prune", "tiny", *more, "--out", "out")
    assert result.exit_code == 1 and said in one_line(result)
    assert "traceback" not in result.stderr
    assert not Path("out").exists() and not Path("out.lock").exists()


DAMAGED = {
    "no object": "[]",
    "sparsity": '{"schema": 1, "recipe": {}, "sparsity": {"achieved": 1}}',
    "sparsity of a wrong type": '{"schema": 1, "sparsity": 3}',
    "plugins": '{"schema": 1, "recipe": {}, "plugins": [{"role": "pruner"}]}',
    "linears": '{"schema": 1, "linears": []}',
    "deep": "[" * 100_000,
    "torn": '{"schema": 1, "recipe"',
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("command", ["prune --recipe run/neuroal.json", "compare run run"])
def test_damaged_reports(name: str, command: str, folder: Path, run: Any) -> None:
    Path("run").mkdir()
    Path("run/neuroal.json").write_text(DAMAGED[name])
    before = tree(folder)
    result = run(*command.split())
    assert result.exit_code == 2 and "neuroal.json'" in one_line(result)
    assert tree(folder) == before


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int64", "bool"])
def test_allocations_are_floating(dtype: str, folder: Path, prune: Any, run: Any) -> None:
    ratios = {"model.layers.0.self_attn.q_proj": torch.ones(1).to(getattr(torch, dtype))}
    save_file(ratios, "x.safetensors")
    before = tree(folder)
    for result in (
        prune("--allocation", "x.safetensors", "--out", "out"),
        run("compare", "x.safetensors", "x.safetensors"),
    ):
        assert f"'x.safetensors' is no allocation: '{next(iter(ratios))}' is {dtype} (1,)" in (
            one_line(result)
        )
    assert tree(folder) == before


def test_terminals_are_sent_no_commands(folder: Path, run: Any) -> None:
    Path("recipe.json").write_text('{"model": "tiny", "pruner": "\\u001b[31mwanda"}')
    result = run("prune", "--recipe", "recipe.json")
    assert "\x1b" not in result.stderr and r"\u001b[31mwanda" in one_line(result)
